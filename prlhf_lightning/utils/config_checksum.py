"""Checksum of a run's `config.yaml`, in a comment on its first line."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.io import atomic_write_bytes

_MARK = "# sha256 of the lines below: "


def add_checksum(path: Path) -> None:
    """Add the SHA-256 of a configuration as a comment on its first line."""
    content = path.read_bytes()
    atomic_write_bytes(path, f"{_MARK}{sha256(content).hexdigest()}\n".encode() + content)


def check_configuration(path: Path) -> None:
    """Check that a run's configuration is unchanged since `fit` wrote it; those of earlier versions have no checksum.

    Raises:
        ConfigurationError: It was changed or damaged, or is not UTF-8 text.
    """
    if changed := change_in(path):
        raise ConfigurationError(changed)


def change_in(path: Path) -> str | None:
    """Return a message if a configuration was changed since `fit` wrote it; otherwise None."""
    content = path.read_bytes()
    first, _, below = content.partition(b"\n")
    if first.startswith(_MARK.encode()) and first != f"{_MARK}{sha256(below).hexdigest()}".encode():
        return (
            f"{path} was changed or damaged since `fit` wrote it. If you changed it on purpose, delete its first line, "
            "which is the checksum."
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line}: is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    if "\0" in text:
        raise ConfigurationError(f"{path} has zero bytes, as an incompletely written file; write it again.")
    return None
