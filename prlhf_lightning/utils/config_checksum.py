"""The checksum of a run's `config.yaml`, in a comment on its first line."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.io import atomic_write_bytes

_MARK = "# sha256 of the lines below: "


def add_checksum(path: Path) -> None:
    """Put the SHA-256 of a configuration into a comment before it."""
    content = path.read_bytes()
    atomic_write_bytes(path, f"{_MARK}{sha256(content).hexdigest()}\n".encode() + content)


def check_configuration(path: Path) -> None:
    """Check that the configuration of a run is as `fit` wrote it, which earlier versions did without a checksum.

    Raises:
        ConfigurationError: It was changed or damaged, or is no text.
    """
    if changed := change_in(path):
        raise ConfigurationError(changed)


def change_in(path: Path) -> str | None:
    """Return what to tell of a configuration that is not as `fit` wrote it, or None."""
    content = path.read_bytes()
    first, _, below = content.partition(b"\n")
    if first.startswith(_MARK.encode()) and first != f"{_MARK}{sha256(below).hexdigest()}".encode():
        return (
            f"{path} is not as `fit` wrote it: it is damaged, or was changed. If you changed it on purpose, delete its "
            "first line, which is the checksum."
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line}: is no UTF-8 text ({error.reason}); save it as UTF-8.") from None
    if "\0" in text:
        raise ConfigurationError(f"{path} holds zeros, as a file that was not written to its end; write it again.")
    return None
