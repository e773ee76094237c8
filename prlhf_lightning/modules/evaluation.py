"""The metrics of an evaluation: mean losses, and accuracies over pairs and over users, of each set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from prlhf_lightning.metrics import PreferenceAccuracy, UserAccuracy
from prlhf_lightning.modules.objective import Term
from prlhf_lightning.modules.processes import gather_objects, stable_hash


class Evaluation:
    """Takes in the batches of one evaluation after the other.

    Its metrics are no part of the module that is evaluated, and so in no checkpoint.

    Attributes:
        sets: Names of the sets, in the order of their dataloaders.

    Args:
        sets: As above.
        personalizes: Whether users differ from the generic user, who then has an accuracy of their own.
        ranks: Whether there are rejected completions to rank the chosen ones above.
    """

    def __init__(self, sets: Sequence[str], personalizes: bool, ranks: bool) -> None:
        self.sets = tuple(sets)
        self._personalizes, self._ranks = personalizes, ranks
        self._losses = {name: MeanMetric() for name in self.sets}
        self._own = {name: PreferenceAccuracy() for name in self.sets}
        self._generic = {name: PreferenceAccuracy() for name in self.sets if personalizes}
        self._user_ids: dict[int, str] = {}  # by the keys under which the accuracies know them

    def update(self, name: str, user_ids: Sequence[str], losses: Tensor, terms: Sequence[Term]) -> None:
        """Add a batch of a set.

        Args:
            name: The set.
            user_ids: B ids.
            losses: `[B]` losses.
            terms: The user's own term and the generic user's, or one for both.
        """
        self._losses[name].update(losses)
        if not self._ranks:
            return
        keys = [stable_hash(user_id) for user_id in user_ids]
        self._user_ids.update(zip(keys, user_ids, strict=True))
        users = torch.tensor(keys, device=losses.device)
        for term in terms:
            metric = (self._generic if term.generic else self._own)[name]
            metric.update(users, term.output.chosen_rewards, term.output.rejected_rewards)

    def values(self, name: str) -> dict[str, Tensor]:
        """Return what to log of a set, over all processes, which all must call this."""
        # Lightning's own mean over batches and processes is wrong where these hold unequal numbers of pairs.
        values = {"loss": self._losses[name].compute()}
        if self._ranks:
            values |= self._own[name].compute()
        # Without personalisation, and for users who are not known, the generic user is what was just computed.
        if self._ranks and self._personalizes and name != "unseen":
            values["generic_accuracy"] = self._generic[name].compute()["accuracy"]
        return values

    def user_table(self, name: str, trainer: Trainer) -> list[tuple[str, UserAccuracy]]:
        """Return each user's id and accuracy in a set, over all processes, which all must call this."""
        user_ids = {key: user_id for part in gather_objects(trainer, self._user_ids) for key, user_id in part.items()}
        return [(user_ids[row.user], row) for row in self._own[name].table()]

    def reset(self, device: torch.device) -> None:
        """Forget the losses and rewards of the last evaluation.

        Args:
            device: Where those of the next one are; a process that has no rows must know too, to take part in sums.
        """
        for metric in (*self._losses.values(), *self._own.values(), *self._generic.values()):
            metric.to(device).reset()
