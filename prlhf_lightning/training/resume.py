"""Where in the training loop a checkpoint goes on.

A checkpoint holds weights and optimizer as they were after a whole step, but may be saved between two: by a validation
in the middle of an accumulation, or where training was interrupted. Gradients are in no checkpoint, so that a run goes
on after the last whole step, and does the batches after it again. Lightning's own counts (2.6.6) go on wrongly from
some places: an epoch that `max_steps` cut short counts as trained, and a validation that was due is left out. So
checkpoints keep the place by a few numbers (`entry`), from which the counts are made anew (`go_on`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from prlhf_lightning.utils import lightning_compat

_PROGRESS = ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress")


@dataclass
class _Validations:
    """Numbers of validations: made so far; until the last whole step; and with the one that came right after it."""

    made: int = 0
    at_step: int = 0
    at_place: int = 0


class StepProgress:
    """Keeps track of the last whole step of a fit, for checkpoints that are saved before the next."""

    def __init__(self) -> None:
        self._place: tuple[int, int] | None = None  # epoch, and batches of it whose steps were taken
        self._is_entered = False
        self._validated = (-1, -1)  # the same, of the last validation
        self._validations = _Validations()
        self._of_loss: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}

    def enter(self, epoch: int, batch: int, validations: int) -> None:
        """Note the place that a checkpoint goes on from, and the number of validations before it."""
        self._place, self._is_entered = (epoch, batch), True
        self._validations = _Validations(validations, validations, validations)

    def begin(self, trainer: Trainer, loss: nn.Module, means: Mapping[str, Tensor]) -> None:
        """Begin to train, where a checkpoint goes on or with a new epoch."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if not self._is_entered:
            self._place, self._validations = (epochs.processed, 0), _Validations()
        self._validated, self._is_entered = (-1, -1), False
        self._remember(loss, means)

    def step_taken(self, epoch: int, batch_idx: int, loss: nn.Module, means: Mapping[str, Tensor]) -> None:
        """Note that the step of a batch was taken, and what the loss and the means to log had added up until then."""
        self._place = (epoch, batch_idx + 1)
        self._validations.at_step = self._validations.at_place = self._validations.made
        self._remember(loss, means)

    def is_logged(self, trainer: Trainer) -> bool:
        """Whether what the last whole step gives to log was logged: Lightning does so when its batch has ended."""
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return (trainer.current_epoch, batch.ready) != self._place or batch.completed == batch.ready

    def validated(self, trainer: Trainer) -> None:
        """Note that a validation was made in full."""
        self._validated = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        self._validations.made += 1
        if self._validated == self._place:
            self._validations.at_place = self._validations.made

    def validate_again(self) -> None:
        """Take the last validation for one that was not made."""
        self._validated = (-1, -1)

    def entry(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the place for a checkpoint; None where nothing is fitted."""
        if self._place is None:
            return None
        epoch, batch = self._place
        is_due = self._is_due(trainer)
        return {
            "epoch": epoch,
            "batch": batch,
            "batches": int(trainer.num_training_batches),
            "validation_due": is_due,
            # Those that are made again are not counted, so that their rows of `metrics.csv` come once.
            "validations": self._validations.at_step if is_due else self._validations.at_place,
        }

    @property
    def of_loss(self) -> dict[str, Tensor]:
        """What the loss keeps, by its names in the module, as it was after the last whole step."""
        return self._of_loss

    @property
    def means(self) -> dict[str, Tensor]:
        """What `IntervalMeans` had added up in this process when the last whole step was taken."""
        return self._means

    def _remember(self, loss: nn.Module, means: Mapping[str, Tensor]) -> None:
        self._means = dict(means)
        self._of_loss = {f"loss.{name}": value.detach().clone() for name, value in loss.named_buffers()}

    def _is_due(self, trainer: Trainer) -> bool:
        here = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        # One that is made since training stops is not due when it goes on.
        if here != self._place or not here[1] or self._validated == here or trainer.should_stop:
            return False
        return lightning_compat.is_validation_due(trainer)


def go_on(checkpoint: Mapping[str, Any], place: Mapping[str, Any], batch: int, batches: int, window: int) -> None:
    """Have a checkpoint go on from a place, whatever Lightning's counts in it are.

    Args:
        checkpoint: What the file holds; the state of its fit loop is changed.
        place: `StepProgress.entry` of the run that wrote it.
        batch: The batch that comes next, in the batches of an epoch of this run.
        batches: Their number.
        window: Batches in an optimizer step of this run.
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
    # As saved when a batch ended, after which Lightning goes on with the next; or, to validate, when all had ended.
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
    # Lightning adds the step itself where a checkpoint is of its end.
    is_added = batch > 0 and (batch % window == 0 or batch == batches)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - is_added


def end_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Have a checkpoint of an earlier version, saved at the very end of an epoch, go on with the next one.

    Lightning (2.6.6) saves there when nothing is validated, before it counts the epoch as completed. Going on from it
    under a limit of steps (`max_steps`), it trains on one batch and takes that for the whole of the next epoch.

    Args:
        checkpoint: What the file holds; the state of its fit loop is changed.
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
    """Set the counts of the present epoch to zero; those of the whole run stay."""
    for name, value in progress.items():
        if name == "current":
            progress[name] = dict.fromkeys(value, 0)
        elif isinstance(value, dict):
            _begin_anew(value)
