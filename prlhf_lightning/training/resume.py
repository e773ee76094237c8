"""Position in the training loop, for checkpoints and resuming.

A checkpoint holds weights and optimizer after a complete step. It may be saved between two steps: by a validation in
the middle of an accumulation, or when training is interrupted. Checkpoints hold no gradients, so a run resumes after
the last complete step and repeats the batches after it. Lightning's own counters (2.6.6) resume wrongly from some
points: an epoch that `max_steps` cut short counts as trained, and a validation that was due is skipped. So checkpoints
store the position in a few numbers (`entry`), from which `go_on` recomputes the counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from prlhf_lightning.utils import lightning_compat

_PROGRESS = ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress")


@dataclass
class _Validations:
    """Numbers of validations: so far; until the last complete step; including the one right after it."""

    made: int = 0
    at_step: int = 0
    at_place: int = 0


class StepProgress:
    """Tracks the last complete step of a fit, for checkpoints that are saved before the next step."""

    def __init__(self) -> None:
        self._place: tuple[int, int] | None = None  # epoch, and its batches up to the last step
        self._is_entered = False
        self._validated = (-1, -1)  # the same for the last validation
        self._validations = _Validations()
        self._state: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}

    def enter(self, epoch: int, batch: int, validations: int) -> None:
        """Set the position to resume from, and the number of validations before it."""
        self._place, self._is_entered = (epoch, batch), True
        self._validations = _Validations(validations, validations, validations)

    def begin(self, trainer: Trainer, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """Start training at the position of a checkpoint, or at a new epoch."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if not self._is_entered:
            self._place, self._validations = (epochs.processed, 0), _Validations()
        self._validated, self._is_entered = (-1, -1), False
        self._remember(state, means)

    def step_taken(self, epoch: int, batch_idx: int, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """Record the step of a batch, with running state, by its names in checkpoints, and the logged means."""
        self._place = (epoch, batch_idx + 1)
        self._validations.at_step = self._validations.at_place = self._validations.made
        self._remember(state, means)

    def is_logged(self, trainer: Trainer) -> bool:
        """Return whether Lightning has logged the values of the last complete step."""
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return (trainer.current_epoch, batch.ready) != self._place or batch.completed == batch.ready

    def validated(self, trainer: Trainer) -> None:
        """Record a complete validation."""
        self._validated = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        self._validations.made += 1
        if self._validated == self._place:
            self._validations.at_place = self._validations.made

    def validate_again(self) -> None:
        """Mark the last validation as not done."""
        self._validated = (-1, -1)

    def entry(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the position for a checkpoint; None outside a fit."""
        if self._place is None:
            return None
        epoch, batch = self._place
        is_due = self._is_due(trainer)
        return {
            "epoch": epoch,
            "batch": batch,
            "batches": int(trainer.num_training_batches),
            "validation_due": is_due,
            # Repeated validations are not counted, so that their rows of `metrics.csv` appear once.
            "validations": self._validations.at_step if is_due else self._validations.at_place,
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """Running state after the last complete step, by its names in checkpoints."""
        return self._state

    @property
    def means(self) -> dict[str, Tensor]:
        """Sums of `IntervalMeans` in this process at the last complete step."""
        return self._means

    def _remember(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        self._means = dict(means)
        self._state = {name: value.detach().clone() for name, value in state.items()}

    def _is_due(self, trainer: Trainer) -> bool:
        here = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        # A validation that ran only because training stopped is not due on resume.
        if here != self._place or not here[1] or self._validated == here or trainer.should_stop:
            return False
        return lightning_compat.is_validation_due(trainer)


def go_on(checkpoint: Mapping[str, Any], place: Mapping[str, Any], batch: int, batches: int, window: int) -> None:
    """Set Lightning's counters in a checkpoint to a position.

    Args:
        checkpoint: Content of the file; the state of its fit loop is changed.
        place: `StepProgress.entry` of its run.
        batch: Number of the next batch in the epoch of this run.
        batches: Batches of an epoch.
        window: Batches per optimizer step of this run.
    """
    loop: dict[str, Any] = checkpoint["loops"]["fit_loop"]
    epoch, due = place["epoch"], place["validation_due"]
    is_over = place["batch"] >= place["batches"] or batch >= batches
    if is_over and due:
        batch = batches
    elif is_over:
        epoch, batch = epoch + 1, 0
    progress = loop["epoch_loop.batch_progress"]
    before = progress["total"]["processed"] - progress["current"]["processed"]  # in earlier epochs
    if not batch:
        for name in _PROGRESS:
            _begin_anew(loop[f"epoch_loop.{name}"])
    # As if saved at the end of a batch, after which Lightning continues with the next one; or, to validate, at the end
    # of all batches.
    ended = batch if due or not batch else batch - 1
    counts = {"ready": batch, "started": batch, "processed": batch, "completed": ended}
    progress["current"] = counts
    if batch:
        progress["total"] = {name: count + before for name, count in counts.items()}
    else:
        progress["total"] = dict.fromkeys(counts, progress["total"]["processed"])
    progress["is_last_batch"] = bool(batch) and batch == batches
    entered = epoch + (batch > 0)
    for kind in ("total", "current"):
        loop["epoch_progress"][kind] = {"ready": entered, "started": entered, "processed": epoch, "completed": epoch}
    loop["epoch_loop.val_loop.batch_progress"] = {
        "total": {"ready": int(due), "started": int(due), "processed": 0, "completed": 0},
        "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
        "is_last_batch": False,
    }
    # Lightning adds the step itself for a checkpoint at its end.
    is_added = batch > 0 and (batch % window == 0 or batch == batches)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - is_added


def end_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Make a checkpoint of an earlier version, saved at the end of an epoch, resume with the next epoch.

    Without validation, Lightning (2.6.6) saves there before it counts the epoch as completed. When it resumes with a
    step limit (`max_steps`), it trains on one batch and counts that as the next epoch.

    Args:
        checkpoint: Content of the file; the state of its fit loop is changed.
    """
    loop: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch = loop.get("epoch_progress")
    if not epoch or not epoch["current"]["completed"] < epoch["current"]["processed"] == epoch["current"]["ready"]:
        return
    for count in epoch.values():
        count["completed"] = count["processed"]
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    for name in _PROGRESS:
        _begin_anew(loop[f"epoch_loop.{name}"])


def _begin_anew(progress: dict[str, Any]) -> None:
    """Set the counters of the current epoch to zero; those of the run do not change."""
    for name, value in progress.items():
        if name == "current":
            progress[name] = dict.fromkeys(value, 0)
        elif isinstance(value, dict):
            _begin_anew(value)
