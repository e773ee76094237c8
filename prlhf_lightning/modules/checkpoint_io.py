"""How a Trainer reads and writes checkpoint files: whole, sealed, and without running anybody's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from prlhf_lightning import checkpoint_files


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints in one step with a seal, and loads only those that are whole.

    A `PersonalizedLM` sees to it that its Trainer uses this; with other modules, give it to the Trainer:
    `Trainer(plugins=[SealedCheckpointIO()])`. Folders (checkpoints in shards) and what is on other file systems are
    left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; one that was there is replaced when the new one is complete.

        Raises:
            CheckpointWriteError: The disk is full, or the like; what was there is untouched.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            checkpoint_files.save(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return what a checkpoint holds; only an explicit `weights_only=False` lets it run code.

        Raises:
            DamagedCheckpointError: The file is not what was written.
        """
        safely = weights_only is not False
        if not is_local(path) or not Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only=safely)
        content: dict[str, Any] = checkpoint_files.load(Path(path), map_location, weights_only=safely)
        return content


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's, and not a URL."""
    return "://" not in str(path)


def use_sealed_files(trainer: Trainer) -> None:
    """Have a trainer write and read sealed files, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SealedCheckpointIO()
