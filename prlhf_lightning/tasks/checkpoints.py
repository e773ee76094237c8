"""Reading checkpoints, with errors that say what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prlhf_lightning import checkpoint_files
from prlhf_lightning.checkpoint_entry import entry_of
from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.modules.checkpoint_schema import check_content
from prlhf_lightning.opening import opening


def read_checkpoint(path: str | Path, option: str, weights_only: bool = True) -> dict[str, Any]:
    """Return what a checkpoint holds, or say why it can't be read; tensors stay on disk.

    Args:
        path: A file, or the folder that a sharded strategy writes, of which nothing is read.
        option: What the user called the path, for messages.
        weights_only: Refuse files that hold code.
    """
    path = Path(path)
    if path.is_dir():
        return {}
    if not path.is_file():
        raise ConfigurationError(
            f"{option}: there is no checkpoint {path}; give a .ckpt file, or the folder, of an earlier run."
        )
    try:
        content: dict[str, Any] = checkpoint_files.load(path, weights_only=weights_only, mmap=True)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{option}: {error}") from error
    try:
        entry_of(content)
        with opening("its content", "Use a checkpoint that `fit` wrote."):
            check_content(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {path}: {error}") from error
    return content
