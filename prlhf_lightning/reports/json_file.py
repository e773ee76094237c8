"""The JSON file next to a page, from which the page is generated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_path(page: Path) -> Path:
    """Return the path of a page's JSON file: next to the page, with its name."""
    return page.with_suffix(".json") if page.suffix != ".json" else page.with_name(f"{page.name}.json")


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n"


def finite(value: Any) -> Any:
    """Return a value with None in place of non-finite numbers, which JSON does not support."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> float:
    """Return a number from JSON, with NaN for null."""
    return math.nan if value is None else value
