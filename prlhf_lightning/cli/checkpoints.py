"""Reading of checkpoint files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of
from prlhf_lightning.training.checkpoint_schema import check_content
from prlhf_lightning.utils.load_errors import opening


def read_checkpoint(path: str | Path, option: str, weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, or raise an error; tensors are memory-mapped.

    Args:
        path: A file, or the folder that a sharded strategy writes, of which nothing is read.
        option: Name of the option, for messages.
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
