"""Checksums of the files in this package: small models and page templates."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from prlhf_lightning.errors import ConfigurationError

ASSETS = Path(__file__).parents[1] / "assets"
_SUMS = "sha256.json"


def sums_of(folder: Path = ASSETS) -> dict[str, str]:
    """Return the SHA-256 of each asset, in the format of `sha256.json`."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: sha256((folder / name).read_bytes()).hexdigest() for name in names if name != _SUMS}


def check_shipped(path: Path) -> None:
    """Check that an asset, or all files of an asset folder, are unchanged.

    Raises:
        ConfigurationError: A file was changed or is missing; the message names it.
    """
    prefix = path.relative_to(ASSETS).as_posix()
    try:
        shipped = json.loads((ASSETS / _SUMS).read_bytes())
        wanted = {name: shipped[name] for name in shipped if name == prefix or name.startswith(f"{prefix}/")}
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(_SUMS) from error
    if not wanted:
        raise _damaged(_SUMS)
    for name, digest in wanted.items():
        file = ASSETS / name
        if not file.is_file() or sha256(file.read_bytes()).hexdigest() != digest:
            raise _damaged(name)


def _damaged(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{ASSETS / name} is not as it came with the package, or its checksum in {_SUMS} is not; install "
        "prlhf_lightning again."
    )
