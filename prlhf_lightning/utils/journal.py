"""A file of finished results beside an output, so that a stopped command continues where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prlhf_lightning.utils.io import append_whole, atomic_write_bytes


class Journal:
    """Results by key, each written to disk as soon as it is known.

    A journal of other settings is replaced. A process that was killed may leave an incomplete last line, which is
    ignored.

    Args:
        path: The file. It holds the settings in its first line, and then one result per line.
        settings: What the results depend on, as JSON values.

    Attributes:
        results: The results by key.
        replaced: Whether there was a journal of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        head = json.dumps(settings, sort_keys=True)
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        goes_on = bool(lines) and lines[0] == head.encode()
        self.results: dict[str, Any] = dict(map(json.loads, lines[1:])) if goes_on else {}
        self.replaced = bool(lines) and not goes_on
        # Also without an incomplete line at the end.
        atomic_write_bytes(path, b"".join(line + b"\n" for line in (lines if goes_on else [head.encode()])))

    def add(self, key: str, result: Any) -> None:
        """Add a result, a JSON value."""
        append_whole(self._path, json.dumps([key, result], ensure_ascii=False).encode() + b"\n")
        self.results[key] = result

    def remove(self) -> None:
        """Remove the file: the results are no longer needed."""
        self._path.unlink(missing_ok=True)
