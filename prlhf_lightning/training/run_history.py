"""Copies files of the earlier run to the folder of a resumed run, so that this folder is complete.

A run never writes to another run's folder, so two runs may resume from the same checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.checkpoint_entry import KEY
from prlhf_lightning.training.distributed import gather_objects
from prlhf_lightning.training.loggers import MetricsFile, read_metrics, run_folder
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.io import atomic_writer, naming

_METRICS, _USER_TABLES = "metrics.csv", "users_*.csv"


class RunHistory(Callback):
    """Copies `metrics.csv`, up to the resumed step, and the user tables to the folder of the new run."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all processes have found the same checkpoint."""
        found = sorted(set(gather_objects(trainer, str(trainer.ckpt_path))))
        if stage == "fit" and len(found) > 1:
            raise ConfigurationError(
                f"ckpt_path: the processes of this run found different checkpoints ({', '.join(found)}), since "
                "another run wrote one meanwhile. Give the path of one, or a separate "
                "trainer.default_root_dir."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the earlier run's folder from the checkpoint, and copy."""
        if trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        folder = run_folder(trainer)  # all processes must ask for it
        earlier = folder_of(trainer.ckpt_path)
        if earlier is None:
            return
        place = (checkpoint.get(KEY) or {}).get("place") or {}
        rows = rows_until(read_metrics(earlier / _METRICS), checkpoint["global_step"], place.get("validations"))
        self._last = last_values(rows)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers[:1]:
            writer = getattr(logger, "_experiment", None)
            if rows and isinstance(writer, MetricsFile):
                writer.begin_with(rows)
        if earlier.resolve() != folder.resolve():
            for table in earlier.glob(_USER_TABLES):
                copy(table, folder / table.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the last logged values: there may be no further validation or step."""
        lightning_compat.set_callback_metrics(trainer, self._last)
        self._last = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have rows bear the number of steps taken; before any other callback logs for this batch."""
        lightning_compat.number_rows(trainer)


def folder_of(checkpoint: Any) -> Path | None:
    """Return the folder of a checkpoint's run, or None if it is in none."""
    folder = Path(str(checkpoint)).parent
    return folder.parent if folder.name == "checkpoints" else None


def rows_until(rows: Sequence[Mapping[str, str]], step: int, validations: int | None) -> list[Mapping[str, str]]:
    """Return the rows of a `metrics.csv` that a resumed run does not write again.

    Args:
        rows: All rows, in their order.
        step: The resumed step.
        validations: Number of validations before it, or None if unknown.
    """
    found, seen = [], 0
    for row in rows:
        is_validation = any("val/" in name and value for name, value in row.items())
        seen += is_validation
        number = row.get("step", "")
        is_before = number.isdecimal() and int(number) < step
        if seen <= validations if is_validation and validations is not None else is_before:
            found.append(row)
    return found


def last_values(rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Return the last value `[]` of each column of a `metrics.csv`."""
    found = {name: value for row in rows for name, value in row.items() if "/" in name and value}
    return {name: torch.tensor(float(value)) for name, value in found.items()}


def best_of_earlier_run(state: Mapping[str, Any], earlier: Path, folder: Path) -> dict[str, Any] | None:
    """Copy the best checkpoints to a new folder and return the state of a `ModelCheckpoint` for it.

    Args:
        state: Its state in the resumed checkpoint.
        earlier: The folder of that checkpoint.
        folder: The folder of the new run's checkpoints.

    Returns:
        The state, or None if one of the best checkpoints is missing.
    """
    names = {path: Path(path).name for path in state["best_k_models"]}
    if not names or not all((earlier / name).is_file() for name in names.values()):
        return None
    for name in names.values():
        copy_on_first(earlier / name, folder / name)
    moved = {path: str(folder / name) for path, name in names.items()}
    return {
        **state,
        "dirpath": str(folder),
        "best_k_models": {moved[path]: score for path, score in state["best_k_models"].items()},
        "best_model_path": moved.get(state["best_model_path"], ""),
        "kth_best_model_path": moved.get(state["kth_best_model_path"], ""),
        "last_model_path": "",
    }


def copy_on_first(source: Path, target: Path) -> None:
    """Copy a file like `copy`, but only in the first process."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically with its modification time, as a hard link if the file system supports it.

    Files are always replaced as a whole, so a change of one does not affect the other.
    """
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.link(source, target)
        return
    with source.open("rb") as original, atomic_writer(target) as file:
        shutil.copyfileobj(original, file)
    shutil.copystat(source, target)
