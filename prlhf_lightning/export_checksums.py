"""Checksums of the files of an exported folder, kept in its `prlhf.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from prlhf_lightning.errors import ConfigurationError

SETTINGS = "prlhf.json"
_KEY = "sha256"
_ADAPTERS = "adapter_config.json"
#: Where the base model is, which people change when it has moved.
_PLACE = "base_model_name_or_path"
#: Beginnings of names of files for people and other programs: they are not read here, so not checked.
_NOT_READ = ("README.md", "user_vectors", "token_embeddings", ".", SETTINGS)


def with_checksums(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `prlhf.json` with the SHA-256 of each file beside it, and of the content itself."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(_NOT_READ)]
    sums = {SETTINGS: _of_json(settings, without=_KEY), **{path.name: _of_file(path) for path in files}}
    return {**settings, _KEY: sums}


def check_checksums(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the files of a folder are those that were exported.

    Args:
        folder: The folder.
        settings: The content of its `prlhf.json`. Format 1 has no checksums; null switches them off.

    Raises:
        ConfigurationError: A file differs; the message names it.
    """
    if settings["format"] == 1 or settings.get(_KEY, "") is None:
        return
    sums = settings.get(_KEY)
    if not isinstance(sums, dict) or sums.get(SETTINGS) != _of_json(settings, without=_KEY):
        raise _changed(folder / SETTINGS)
    for name, digest in sums.items():
        path = folder / name
        if name != SETTINGS and (not path.is_file() or _of_file(path) != digest):
            raise _changed(path)


def _changed(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is not as it was exported. If it is damaged, export the folder again; if it was changed on purpose, "
        f'write "{_KEY}": null in place of the checksums in {SETTINGS}.'
    )


def _of_file(path: Path) -> str:
    if path.name == _ADAPTERS:
        return _of_json(json.loads(path.read_bytes()), without=_PLACE)
    with path.open("rb") as file:
        return file_digest(file, sha256).hexdigest()


def _of_json(content: Mapping[str, Any], without: str) -> str:
    rest = {name: value for name, value in content.items() if name != without}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
