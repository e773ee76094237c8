"""Callbacks that write files: checkpoints, user tables, predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.finite import finite_everywhere, trained_state
from prlhf_lightning.training.loggers import run_folder
from prlhf_lightning.training.optim import optimizer_steps
from prlhf_lightning.training.reward_module import PersonalizedRewardModel
from prlhf_lightning.training.run_history import best_of_earlier_run, copy_on_first
from prlhf_lightning.training.sharding import is_sharded
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.finite import are_finite
from prlhf_lightning.utils.io import append_whole, atomic_writer, escape_cell, naming, put_in_place, text_writer


def kept_by(trainer: Trainer) -> list[str]:
    """Return the paths of the best and the last checkpoint of a run, if they exist."""
    found = [path for one in trainer.checkpoint_callbacks for path in (one.best_model_path, one.last_model_path)]  # type: ignore[attr-defined]
    here = Path.cwd()
    paths = [Path(path) for path in dict.fromkeys(found) if path and Path(path).exists()]
    return [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]


class BestAndLast(ModelCheckpoint):
    """Keeps the best checkpoint by a validation metric, and the last.

    Without a validation set, only the last is kept.

    Args:
        monitor: Name of the monitored value.
        mode: Whether small (`min`) or large (`max`) values are better.
        save_top_k: Number of best checkpoints to keep.
        every_n_train_steps: Also save the last checkpoint every this many steps; null saves only after each validation
                    and at the end of training.
    """

    def __init__(
        self,
        monitor: str = "val/seen/loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            filename="best-step{step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
        )
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ConfigurationError(
                f"checkpoint.every_n_train_steps is {every_n_train_steps}; it must be 1 or more, or null."
            )
        self._every, self._last_step = every_n_train_steps, 0
        self._is_due = False
        self._earlier: Path | None = None  # the resumed checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Treat the resumed step as saved."""
        super().on_train_start(trainer, pl_module)
        self._last_step, self._is_due = trainer.global_step, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn the monitor off if there is no validation."""
        super().setup(trainer, pl_module, stage)
        sets = getattr(trainer.datamodule, "eval_sets", {}).get("validate", ())  # type: ignore[attr-defined]
        if stage != "fit" or self.monitor is None:
            return
        judged_by = next((name for name in ("seen", "unseen") if self.monitor.startswith(f"val/{name}/")), None)
        if not sets or not trainer.limit_val_batches or (judged_by and judged_by not in sets):
            self.monitor = None
            rank_zero_info("There is no validation to choose a best checkpoint: only the last is kept.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Schedule a save of the last checkpoint every so many steps, after the step's values are logged.

        Lightning itself saves nothing before the first validation, which in a run of one epoch is the end, and
        afterwards chooses the best by earlier validations.
        """
        step = trainer.global_step
        # The last step: batches are accumulated.
        self._is_due = bool(self._every and step % self._every == 0 and step != self._last_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the last checkpoint if that is due."""
        self._save_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint if that is due, before a validation that may take long."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        if not self._is_due:
            return
        saved = self._last_global_step_saved
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = saved  # a validation after this step must still save the best

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, or, in the sanity check before training, verify that the monitor is logged."""
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        is_late = self.monitor is None or self.monitor.startswith("train/")  # logged only in training
        if trainer.sanity_checking and not is_late and self.monitor not in known:
            raise ConfigurationError(f"checkpoint.monitor is {self.monitor!r}; it must be one of {', '.join(known)}.")
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if there is no validation."""
        self._save_if_due(trainer)
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint if no validation has saved the last step; not in a trial run.

        Lightning saves only at a validation, and would miss the steps after it; in a trial run (`fast_dev_run`) it
        would save.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        super().on_train_end(trainer, pl_module)
        if trainer.global_step != self._last_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Save the last checkpoint and record its step."""
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._last_step, self._is_due = trainer.global_step, False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Save the best checkpoint, or report that there was no validation yet, where Lightning suggests a bug."""
        if self.monitor in (None, *monitor_candidates) or lightning_compat.has_validated(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        else:
            rank_zero_info(f"No validation yet, so no {self.monitor} to choose a best checkpoint.")

    def _keep_last(self, trainer: Trainer) -> None:
        """Save the last checkpoint if it is not a best one: Lightning would not update the file."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the checkpoint; Lightning asks for its list of best checkpoints right after this."""
        self._earlier = Path(trainer.ckpt_path) if trainer.state.fn == TrainerFn.FITTING else None  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the list of best checkpoints, and copy their files if this run has another folder."""
        if self._earlier is None or self.dirpath is None:
            return
        earlier, folder = self._earlier.parent, Path(self.dirpath)
        if self.dirpath == state_dict.get("dirpath") or earlier.resolve() == folder.resolve():
            super().load_state_dict({**state_dict, "dirpath": self.dirpath})
            return
        if (state := best_of_earlier_run(state_dict, earlier, folder)) is not None:
            super().load_state_dict(state)
        elif state_dict["best_k_models"]:
            rank_zero_warn(
                f"Some of the best checkpoints are missing in {earlier}: the best is chosen from later ones only."
            )
        if self._earlier.is_file():  # there may be no step left
            self.last_model_path = str(folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
            copy_on_first(self._earlier, Path(self.last_model_path))


class LogShortRuns(Callback):
    """Logs a training that is shorter than the logging interval at its last step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shorten the interval to the length of the run."""
        if stage == "fit":
            # Lightning reads the attribute at each step.
            trainer.log_every_n_steps = min(trainer.log_every_n_steps, optimizer_steps(trainer))  # type: ignore[attr-defined]


class SaveOnInterrupt(Callback):
    """Saves a checkpoint when training is interrupted by a person, a scheduler or an error."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder now: all processes must ask for it, but an error may occur in only one."""
        self._path = run_folder(trainer) / "checkpoints" / "interrupted.ckpt"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save `interrupted.ckpt` and print how to resume, unless the weights are unusable."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # After an error in one process, the others wait for it in training, not here.
        together = trainer.world_size == 1 or isinstance(exception, NonFiniteError | SIGTERMException)
        sharded = is_sharded(getattr(pl_module, "policy", pl_module))
        path = self._path
        try:
            if not together and sharded:
                raise _Unsaved("each process holds a part of the weights, and they did not stop together")
            if any(getattr(optimizer, "is_stepping", False) for optimizer in trainer.optimizers):
                raise _Unsaved("the weights were in the middle of a step")
            if not _is_finite(trainer, pl_module, together):
                raise _Unsaved("the weights are not finite")
            if trainer.validating:
                _validate_anew(trainer)
            if isinstance(pl_module, PersonalizedLM):
                pl_module.validate_again()
                pl_module.log_last_step()
                if not together:
                    pl_module.before_lone_save()
            if together:
                trainer.save_checkpoint(path, weights_only=False)
            else:
                lightning_compat.save_checkpoint_alone(trainer, path)
        except Exception as error:  # must not hide the original error
            why = str(error).rstrip(".")
            rank_zero_warn(f"Interrupted at step {trainer.global_step}, and interrupted.ckpt was not written: {why}.")
        else:
            rank_zero_info(
                f"Interrupted at step {trainer.global_step}. Resume with the same command and --ckpt_path {path}"
            )


def _is_finite(trainer: Trainer, module: LightningModule, together: bool) -> bool:
    state = trained_state(module, trainer).values()
    return finite_everywhere(trainer, state, module.device) if together else are_finite(state)


def _validate_anew(trainer: Trainer) -> None:
    """Make a resumed run repeat an interrupted validation in full: its sums are in no checkpoint.

    Depending on the batch, Lightning would continue it at the next batch or skip it.
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.current.reset()
    progress.total.ready = progress.total.started = max(1, progress.total.started)
    progress.total.processed = progress.total.completed = progress.total.started - 1


class _Unsaved(Exception):
    """The reason why no checkpoint is written."""


class UserTable(Callback):
    """Writes each user's accuracy after every evaluation: `users_seen.csv` and `users_unseen.csv`."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables of the validation sets."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables of the test sets."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, PersonalizedLM | PersonalizedRewardModel):
            return
        if module.loss.feedback == "demonstrations":
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = run_folder(trainer)  # in every process, like the table: both communicate
        for name in module.eval_sets:
            table = module.user_table(name)
            if trainer.is_global_zero and table:
                path = folder / f"users_{name}.csv"
                columns = ["user_id", *(field.name for field in fields(table[0][1]) if field.name != "user")]
                with atomic_writer(path) as file, text_writer(file) as text:
                    writer = csv.writer(text)
                    writer.writerow(columns)
                    writer.writerows([escape_cell(user_id), *astuple(row)[1:]] for user_id, row in table)


class PredictionWriter(BasePredictionWriter):
    """Writes the answers of `predict` to `predictions.jsonl`, one row per prompt.

    Complete rows are appended to `predictions.partial.jsonl`, which is renamed at the end.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the file of this process."""
        super().setup(trainer, pl_module, stage)
        self.path, self._rows = None, 0
        if stage == "predict" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
            self.path = run_folder(trainer) / f"predictions{suffix}.jsonl"
            self._partial = self.path.with_suffix(".partial.jsonl")
            with naming(self._partial):
                self._partial.unlink(missing_ok=True)
            append_whole(self._partial, b"")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch's rows, each with its evaluation set and its position in the data."""
        if self.path is None:
            return
        data: Any = getattr(trainer, "datamodule", None)
        name = pl_module.eval_sets[dataloader_idx] if isinstance(pl_module, PersonalizedLM) else ""
        rows = [
            {"row": data.where(record, "predict", dataloader_idx) if data else record, "set": name, **row}
            for record, row in zip(batch.records.tolist(), prediction, strict=True)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        append_whole(self._partial, lines.encode())
        self._rows += len(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename the file and print its path."""
        if self.path is not None:
            with naming(self.path):
                put_in_place(self._partial, self.path)
            rank_zero_info(f"Predictions are in {self.path}")
            self.path = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the path of the rows written so far."""
        if self.path is None:
            return
        if self._rows:
            rank_zero_warn(f"The {self._rows} answers written so far are in {self._partial}")
        else:
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
