"""Files that come with the package, known to be what was shipped: small models, and the template of pages."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from prlhf_lightning.errors import ConfigurationError

ASSETS = Path(__file__).parents[1] / "assets"
_SUMS = "sha256.json"


def sums_of(folder: Path = ASSETS) -> dict[str, str]:
    """Return the SHA-256 of each file that is shipped, as `sha256.json` among them has it."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: sha256((folder / name).read_bytes()).hexdigest() for name in names if name != _SUMS}


def check_shipped(path: Path) -> None:
    """Check that a shipped file, or all files of a shipped folder, are what was shipped.

    Raises:
        ConfigurationError: One is not; the message names it.
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
