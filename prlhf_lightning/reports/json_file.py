"""The JSON file beside a page: the content that the page is made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_path(page: Path) -> Path:
    """Return where the numbers of a page go: beside it, under its name."""
    return page.with_suffix(".json") if page.suffix != ".json" else page.with_name(f"{page.name}.json")


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n"


def finite(value: Any) -> Any:
    """Return a value in which numbers that are not finite, which JSON does not have, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> float:
    """Return a number of JSON, which has null where there was NaN."""
    return math.nan if value is None else value
