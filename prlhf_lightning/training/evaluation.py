"""Metrics of an evaluation: mean losses, and accuracies (for thumbs: areas under the curve) over users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from prlhf_lightning.metrics import PreferenceAccuracy, UnpairedAUC, UserAccuracy, UserAUC
from prlhf_lightning.training.distributed import gather_objects, stable_hash
from prlhf_lightning.types import Feedback, LossOutput

_METRICS: dict[Feedback, type[PreferenceAccuracy | UnpairedAUC]] = {"pairs": PreferenceAccuracy, "thumbs": UnpairedAUC}
HEADLINE: dict[Feedback, str] = {"pairs": "accuracy", "thumbs": "auc"}
"""The main metric for each kind of feedback."""


class Judged(Protocol):
    """The rewards of a batch under its own users, or under the generic user."""

    @property
    def generic(self) -> bool:
        """Whether the generic user replaced each user."""

    @property
    def output(self) -> LossOutput:
        """The losses and rewards."""


class Evaluation:
    """Accumulates the batches of evaluations.

    Its metrics are not part of the evaluated module, so no checkpoint holds them.

    Attributes:
        sets: Names of the sets, in the order of their dataloaders.

    Args:
        sets: As above.
        personalizes: Whether users differ from the generic user, which then has an accuracy of its own.
        feedback: Kind of rows; demonstrations cannot be ranked.
    """

    def __init__(self, sets: Sequence[str], personalizes: bool, feedback: Feedback) -> None:
        self.sets = tuple(sets)
        self._personalizes, self._headline = personalizes, HEADLINE.get(feedback)
        self._losses = {name: MeanMetric() for name in self.sets}
        metric = _METRICS.get(feedback)
        self._own = {name: metric() for name in self.sets if metric}
        self._generic = {name: metric() for name in self.sets if metric and personalizes}
        self._user_ids: dict[int, str] = {}  # by the accuracies' keys

    def update(self, name: str, user_ids: Sequence[str], losses: Tensor, terms: Sequence[Judged]) -> None:
        """Add a batch of a set.

        Args:
            name: The set.
            user_ids: B ids.
            losses: `[B]` losses.
            terms: The user's own term and the generic user's, or one for both.
        """
        self._losses[name].update(losses)
        if not self._headline:
            return
        keys = [stable_hash(user_id) for user_id in user_ids]
        self._user_ids.update(zip(keys, user_ids, strict=True))
        users = torch.tensor(keys, device=losses.device)
        for term in terms:
            metric = (self._generic if term.generic else self._own)[name]
            metric.update(users, term.output.chosen_rewards, term.output.rejected_rewards)

    def values(self, name: str) -> dict[str, Tensor]:
        """Return the metrics of a set over all processes; all processes must call this."""
        # Lightning's own mean over batches and processes is wrong if they hold different numbers of pairs.
        values = {"loss": self._losses[name].compute()}
        if self._headline:
            values |= self._own[name].compute()
        # Without personalization, and for unknown users, this is the generic user's value.
        if self._headline and self._personalizes and name != "unseen":
            values[f"generic_{self._headline}"] = self._generic[name].compute()[self._headline]
        return values

    def user_table(
        self, name: str, trainer: Trainer, generic: bool = False
    ) -> list[tuple[str, UserAccuracy | UserAUC]]:
        """Return each user's id and accuracy in a set over all processes; all processes must call this.

        Args:
            name: The set.
            trainer: The trainer of the processes.
            generic: Whether the generic user ranks the users' rows; only where users differ from it.
        """
        user_ids = {key: user_id for part in gather_objects(trainer, self._user_ids) for key, user_id in part.items()}
        metric = (self._generic if generic else self._own)[name]
        return [(user_ids[row.user], row) for row in metric.table()]

    def margins(self, name: str) -> Tensor | None:
        """Return the margins of a set's pairs over all processes, `[2, N]`: of the generic user, and of users' own.

        All processes must call this. It is None for other feedback, and where users do not differ.
        """
        metrics = (self._generic.get(name), self._own.get(name))
        found = [metric.margins().cpu() for metric in metrics if isinstance(metric, PreferenceAccuracy)]
        return torch.stack(found) if len(found) == 2 else None

    def reset(self, device: torch.device) -> None:
        """Reset for a new evaluation.

        Args:
            device: Device of its tensors; a process without rows needs it too, for the sums over processes.
        """
        for metric in (*self._losses.values(), *self._own.values(), *self._generic.values()):
            metric.to(device).reset()


class EvaluationHooks(LightningModule):
    """The hooks of validation and test, for modules that score a batch in `_evaluation_step`."""

    _evaluation: Evaluation

    def _evaluation_step(self, batch: Any, dataloader_idx: int) -> None:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the seen or unseen users' validation pairs."""
        self._evaluation_step(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the seen or unseen users' test pairs."""
        self._evaluation_step(batch, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics of the last validation."""
        self._evaluation.reset(self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the metrics of the last test."""
        self._evaluation.reset(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and margin over pairs and over users."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracy and margin over pairs and over users."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for name in self.eval_sets:
            for key, value in self._evaluation.values(name).items():
                # They are reduced already; sync_dist only silences Lightning's warning.
                self.log(
                    f"{stage}/{name}/{key}", value.to(self.device), prog_bar=key in HEADLINE.values(), sync_dist=True
                )

    def user_table(self, name: str, generic: bool = False) -> list[tuple[str, UserAccuracy | UserAUC]]:
        """Return each user's id and accuracy in the last evaluation of a set, `seen` or `unseen`.

        With several processes, all must call it. With `generic`, the generic user ranks the rows in each user's place.
        """
        return self._evaluation.user_table(name, self.trainer, generic)

    @property
    def eval_sets(self) -> tuple[str, ...]:
        """Names of the current stage's evaluation sets, in the order of their dataloaders."""
        return self._evaluation.sets
