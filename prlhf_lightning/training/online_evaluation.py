"""Metrics of online RL: the rewards of held-out answers, over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prlhf_lightning.data.splits import spread
from prlhf_lightning.online.rewards import Judged


@dataclass(frozen=True)
class UserReward:
    """A user's mean reward in an evaluation.

    Attributes:
        user: The user's number in the evaluation.
        answers: Number of answers with a reward.
        reward: Their mean; NaN if there are none.
    """

    user: int
    answers: int
    reward: float


class RewardEvaluation:
    """Accumulates the rewards of answers under their own users and under the generic user.

    Attributes:
        sets: Names of the sets, in the order of their dataloaders.

    Args:
        sets: As above.
    """

    def __init__(self, sets: Sequence[str]) -> None:
        self.sets = tuple(sets)
        self.reset()

    def reset(self) -> None:
        """Reset for a new evaluation."""
        self._rewards: dict[tuple[str, bool], dict[str, list[float]]] = {
            (name, generic): {} for name in self.sets for generic in (False, True)
        }
        self._answers: list[dict[str, Any]] = []

    def update(self, name: str, user_ids: Sequence[str], judged: Judged, generic: bool) -> None:
        """Add a batch of a set.

        Args:
            name: The set.
            user_ids: B ids.
            judged: One answer for each.
            generic: Whether the generic user replaced each user.
        """
        rewards = judged.scores.total.tolist()
        for user_id, reward in zip(user_ids, rewards, strict=True):
            self._rewards[name, generic].setdefault(user_id, []).append(reward)
        if not generic:
            rows = zip(user_ids, judged.prompts, judged.texts, rewards, strict=True)
            self._answers += [
                {"set": name, "user_id": u, "prompt": p, "answer": a, "reward": None if r != r else r}
                for u, p, a, r in rows
            ]

    def answers(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` answers under their own users, spread evenly over the evaluation."""
        return [self._answers[place] for place in spread(len(self._answers), count).tolist()]

    def values(self, name: str) -> dict[str, Tensor]:
        """Return the metrics of a set: means over users, of each user's mean."""
        own = self._by_user(name, False)
        worst = own.sort().values[: max(1, len(own) // 10)]
        values = {"reward": own.mean(), "reward_worst_decile": worst.mean()}
        if self._rewards[name, True]:
            values["generic_reward"] = self._by_user(name, True).mean()
        return values

    def user_table(self, name: str, generic: bool = False) -> list[tuple[str, UserReward]]:
        """Return each user's id and mean reward in a set."""
        return [
            (user_id, UserReward(number, int((~torch.tensor(found).isnan()).sum()), _mean(found)))
            for number, (user_id, found) in enumerate(sorted(self._rewards[name, generic].items()))
        ]

    def _by_user(self, name: str, generic: bool) -> Tensor:
        """Return the mean rewards `[U]` of users with any."""
        means = torch.tensor([_mean(found) for found in self._rewards[name, generic].values()])
        return means[~means.isnan()]


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values).nanmean())
