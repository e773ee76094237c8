"""Advice about the number of training steps, and about settings after too little or too much learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning.metrics import UserAccuracy
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.optim import optimizer_steps, training_batches
from prlhf_lightning.types import PreferenceBatch

_STEPS = 100  # optimizer steps below which a model rarely learns much
_EPOCHS = 10  # no more are advised: user rows then fit the noise of few votes
_CHANCE = 0.58  # training accuracy up to which little was learned, allowing for noise in the last batches
_GAP = 0.15  # excess of training over held-out accuracy from which a model overfits
_SMALL = 0.2  # margin in nats: the model hardly prefers the chosen completions more than before training
_HIGH = 2e-3  # a learning rate of adapters that is rarely too low


@dataclass(frozen=True)
class Outcome:
    """Results of a training; None for unknown values.

    Attributes:
        train_accuracy: Share of correctly ranked training pairs, over the last third of the steps.
        train_margin: Mean reward of chosen minus rejected completions over the same steps.
        train_pairs: Approximate number of training pairs of that third.
        accuracy: Share of correctly ranked held-out pairs of seen users (for thumbs, the area under the curve).
        pairs: Number of held-out pairs.
        losses: Held-out loss by step.
        steps: Number of optimizer steps.
    """

    train_accuracy: float | None = None
    train_margin: float | None = None
    train_pairs: int = 0
    accuracy: float | None = None
    pairs: int = 0
    losses: Mapping[int, float] | None = None
    steps: int | None = None


class LearningMonitor(Callback):
    """Warns before a training with few steps, and gives advice at its end."""

    def __init__(self) -> None:
        self._readings: list[tuple[float, float, int]] = []
        self._losses: dict[int, float] = {}
        self._read_at, self._pairs = 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn about few steps, unless this is a trial or a resumed run."""
        self._readings, self._losses = [], {}
        self._read_at, self._pairs = trainer.global_step, 0
        if trainer.fast_dev_run or trainer.global_step or not hasattr(trainer.datamodule, "batches_per_epoch"):  # type: ignore[attr-defined]
            return
        size = getattr(trainer.datamodule, "batch_size", 1)  # type: ignore[attr-defined]
        by_steps = trainer.max_steps if 0 <= trainer.max_steps == optimizer_steps(trainer) else None
        if advice := more_steps(
            training_batches(trainer), trainer.max_epochs or 1, trainer.accumulate_grad_batches, size, by_steps
        ):
            rank_zero_warn(advice)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record accuracy and margin when the logger reads the same values from the device."""
        self._pairs += len(batch) if isinstance(batch, PreferenceBatch) else 0
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._read_at:
            return
        self._read_at = step
        values = [trainer.callback_metrics.get(f"train/{name}") for name in ("accuracy", "margin")]
        if all(value is not None for value in values):
            accuracy, margin = (float(value) for value in values)  # type: ignore[arg-type]
            self._readings.append((accuracy, margin, self._pairs * trainer.world_size))
        self._pairs = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the loss."""
        loss = trainer.callback_metrics.get("val/seen/loss")
        if not trainer.sanity_checking and loss is not None:
            self._losses[trainer.global_step] = float(loss)

    def advice(self, trainer: Trainer, module: PersonalizedLM) -> str | None:
        """Return the settings to change after a training; all processes must call this."""
        # The last third: learning rates are low by then.
        last = self._readings[-math.ceil(len(self._readings) / 3) :]
        accuracies, margins, pairs = zip(*last, strict=True) if last else ((), (), ())
        validated = "seen" in module.eval_sets and bool(self._losses)
        rows = module.user_table("seen") if validated and module.loss.feedback != "demonstrations" else []
        metrics = trainer.callback_metrics
        held_out = metrics.get("val/seen/accuracy", metrics.get("val/seen/auc"))
        outcome = Outcome(
            train_accuracy=fmean(accuracies) if last else None,
            train_margin=fmean(margins) if last else None,
            train_pairs=sum(pairs),
            accuracy=float(held_out) if held_out is not None else None,
            pairs=sum(row.pairs if isinstance(row, UserAccuracy) else row.ups + row.downs for _, row in rows),
            losses=self._losses,
            steps=trainer.global_step,
        )
        return what_to_change(outcome, settings_of(trainer, module))


def more_steps(batches: int, epochs: int, accumulate: int, batch_size: int, max_steps: int | None = None) -> str | None:
    """Return the settings to change if a training has few steps, or None.

    Args:
        batches: Batches of an epoch.
        epochs: Epochs.
        accumulate: Batches of an optimizer step.
        batch_size: Rows of a batch.
        max_steps: `trainer.max_steps` if it ends the training.
    """
    steps = max_steps if max_steps is not None else math.ceil(batches / accumulate) * epochs
    if steps >= _STEPS or (max_steps is None and epochs < 0):
        return None
    said = f"Training takes {steps} optimizer steps; below about {_STEPS} a model rarely learns much. Set "
    if max_steps is not None:
        return f"{said}trainer.max_steps to {_STEPS} or more (now {max_steps}), unless this is a trial."
    changes = []
    fewer = max((a for a in range(1, accumulate) if math.ceil(batches / a) * epochs >= _STEPS), default=1)
    if fewer < accumulate:
        changes.append(f"trainer.accumulate_grad_batches {fewer} (now {accumulate})")
    an_epoch = math.ceil(batches / fewer)
    if an_epoch * epochs < _STEPS and epochs < _EPOCHS:
        changes.append(f"trainer.max_epochs {min(_EPOCHS, math.ceil(_STEPS / an_epoch))} (now {epochs})")
    if an_epoch * max(epochs, _EPOCHS) < _STEPS and batch_size > 1:
        changes.append(f"data.batch_size {max(1, batch_size * an_epoch * _EPOCHS // _STEPS)} (now {batch_size})")
    return f"{said}{', '.join(changes)}, or give more data." if changes else f"{said}more epochs, or give more data."


def settings_of(trainer: Trainer, module: PersonalizedLM) -> dict[str, float]:
    """Return the settings that affect how much is learned, by their names on the command line."""
    settings: dict[str, float] = {"model.optim.lr": module.optim.lr or 0.0}
    if module.user_model.personalizes:
        settings["model.optim.user_lr"] = module.optim.user_lr or 0.0
    if hasattr(module.loss, "beta"):
        settings["model.loss.beta"] = module.loss.beta
    settings["trainer.max_epochs"] = trainer.max_epochs or 1
    settings["trainer.accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return settings


def what_to_change(outcome: Outcome, settings: Mapping[str, float]) -> str | None:
    """Return the settings to change and the evidence if a model learned nothing or overfitted, or None.

    Args:
        outcome: Results of the training.
        settings: Result of `settings_of`.
    """
    held_out, train = outcome.accuracy, outcome.train_accuracy
    found = []
    if train is not None:
        found.append(f"training pairs {train:.2f}")
    if held_out is not None:
        found.append(f"held-out pairs {held_out:.2f}")
    evidence = f"{' and '.join(found)} (0.50 is chance)"
    by_luck = held_out is None or held_out <= _by_luck(outcome.pairs)
    if found and by_luck and (train is None or train < max(_CHANCE, _by_luck(outcome.train_pairs))):
        told = f"The model learned next to nothing: it ranks right {evidence}"
        if outcome.steps is not None and outcome.steps < _STEPS:
            return (
                f"{told}, after {outcome.steps} optimizer steps. Train for {_STEPS} or more before changing the rates."
            )
        return f"{told}. {_to_learn_more(outcome, settings)}"
    if train is None or held_out is None or train - held_out < _GAP or train < _CHANCE:
        return None
    told = f"The model overfits: it ranks right {evidence}"
    losses = outcome.losses or {}
    best = min(losses, key=lambda step: losses[step], default=None)
    if best is not None and best != max(losses):
        told += f"; the held-out loss was lowest at step {best} ({losses[best]:.3f}), and is {losses[max(losses)]:.3f}"
    changes = [f"fewer trainer.max_epochs ({settings['trainer.max_epochs']:g})"] * (settings["trainer.max_epochs"] > 1)
    rates = [name for name in ("model.optim.lr", "model.optim.user_lr") if name in settings]
    changes += [f"half of {name} ({settings[name]:g})" for name in rates]
    if "model.optim.user_lr" in settings:
        changes.append("model.optim.user_weight_decay 0.1, which pulls users with few votes toward the generic user")
    if "model.loss.beta" in settings:
        changes.append(f"a higher model.loss.beta ({settings['model.loss.beta']:g})")
    return f"{told}. Use the best checkpoint, or try one by one: {'; '.join(changes)}; more data for each user."


def _by_luck(pairs: int) -> float:
    """Return two standard errors above the accuracy of guessing."""
    return 0.5 + 1 / math.sqrt(pairs) if pairs else 0.0


def _to_learn_more(outcome: Outcome, settings: Mapping[str, float]) -> str:
    rate, beta = settings["model.optim.lr"], settings.get("model.loss.beta")
    margin = outcome.train_margin
    # A margin is beta times log-probabilities.
    moved = abs(margin) / beta >= _SMALL * 10 if margin is not None and beta else False
    losses = outcome.losses or {}
    worse = len(losses) > 1 and losses[max(losses)] > 1.2 * losses[min(losses)]
    if moved or worse or rate >= _HIGH:
        return (
            f"The weights did move: the rates may be too high (model.optim.lr is {rate:g}), or the votes may be noise. "
            "Try lower rates or a higher model.loss.beta, and look at the votes with `data describe`."
        )
    changes = [
        f"{name} {5 * settings[name]:.2g} (now {settings[name]:.2g})"
        for name in ("model.optim.lr", "model.optim.user_lr")
        if name in settings
    ]
    if settings["trainer.accumulate_grad_batches"] > 1:
        changes.append(f"trainer.accumulate_grad_batches 1 (now {settings['trainer.accumulate_grad_batches']:g})")
    changes.append(f"more trainer.max_epochs (now {settings['trainer.max_epochs']:g})")
    how = "The weights hardly moved. " if margin is not None else ""
    return f"{how}Try, in this order: {'; '.join(changes)}. `data describe` shows whether the votes can be predicted."
