"""Location of the cache folder, and resolution of paths in configurations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path


def default_cache_dir() -> Path:
    """Return `$PRLHF_CACHE`, or `~/.cache/prlhf_lightning`."""
    return Path(os.environ.get("PRLHF_CACHE") or "~/.cache/prlhf_lightning").expanduser()


def resolve_path(path: str, folders: Sequence[Path]) -> str:
    """Return the absolute form of a path, a pattern of files, or the URL of a SQLite file.

    Args:
        path: The path as given.
        folders: Folders to search, in this order. If none contains it, the path is returned unchanged.
    """
    scheme = "sqlite:///" if path.startswith("sqlite:///") else ""
    relative = Path(path.removeprefix(scheme)).expanduser()
    if "://" in path and not scheme:
        return path
    for folder in folders:
        found = (folder / relative).absolute()
        if found.exists() or (has_magic(str(relative)) and glob(str(found), recursive=True)):
            return f"{scheme}{found}"
    return path
