"""Preference accuracy and margin, over pairs and over users.

B pairs, U distinct users. A user is any int64 key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class UserAccuracy:
    """Preference accuracy of one user.

    Attributes:
        user: The user's key.
        pairs: Number of the user's pairs.
        accuracy: Share of the pairs whose chosen completion has the higher reward; ties count as half.
        low: Lower end of the 95% Wilson interval of the accuracy.
        high: Upper end of this interval.
        margin: Mean difference between the rewards of chosen and rejected completions.
    """

    user: int
    pairs: int
    accuracy: float
    low: float
    high: float
    margin: float


def pair_scores(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return 1 for each correctly ranked pair, 0.5 for a tie, 0 otherwise, `[B]`; NaN stays NaN."""
    margin = chosen_rewards - rejected_rewards
    return torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)


def mean_by_user(users: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct users' keys in ascending order, `[U]`, and the mean of each user's values, `[U]`.

    Args:
        users: `[B]` int64 key of the user of each value.
        values: `[B]` float.
    """
    keys, position, counts = torch.unique(users, return_inverse=True, return_counts=True)
    return keys, values.new_zeros(len(keys)).index_add(0, position, values) / counts


def preference_accuracy(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Return accuracies over pairs and over users, and the mean margin; NaN without pairs.

    Args:
        users: `[B]` int64 key of the user of each pair.
        chosen_rewards: `[B]` rewards of the chosen completions.
        rejected_rewards: `[B]` rewards of the rejected completions.

    Returns:
        `accuracy` over pairs, `accuracy_user_mean` over users, `accuracy_worst_decile` over the tenth of users with
        the lowest accuracies (rounded down, at least one user), and `margin`, the mean over pairs.
    """
    scores = pair_scores(chosen_rewards, rejected_rewards)
    by_user = mean_by_user(users, scores)[1]
    return {
        "accuracy": scores.mean(),
        "accuracy_user_mean": by_user.mean(),
        "accuracy_worst_decile": by_user.sort().values[: max(1, len(by_user) // 10)].mean(),
        "margin": (chosen_rewards - rejected_rewards).mean(),
    }


def wilson_interval(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a share observed in n trials (Wilson 1927, as in Brown et al. 2001, Eq. 4).

    Unlike share ± z·sd, it stays within [0, 1] and is not empty at shares of 0 and 1, which are common for users with
    few pairs.
    """
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def user_accuracies(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> list[UserAccuracy]:
    """Return one row per user, in ascending order of keys; arguments as for `preference_accuracy`."""
    keys, accuracies = mean_by_user(users, pair_scores(chosen_rewards, rejected_rewards))
    margins = mean_by_user(users, chosen_rewards - rejected_rewards)[1]
    counts = torch.unique(users, return_counts=True)[1]
    return [
        UserAccuracy(user, pairs, accuracy, *wilson_interval(accuracy, pairs), margin)
        for user, pairs, accuracy, margin in zip(
            keys.tolist(), counts.tolist(), accuracies.tolist(), margins.tolist(), strict=True
        )
    ]


class RewardsByUser(Metric):
    """Base class: collects the users and rewards of all rows, exact under any split of rows over processes.

    Each process may have any number of rows, or none, of any users.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    users: list[Tensor]
    chosen_rewards: list[Tensor]
    rejected_rewards: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("users", "chosen_rewards", "rejected_rewards"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Clear all pairs."""
        super().reset()
        # A process without pairs must still send an int64 and two float32 tensors. For an empty list, torchmetrics
        # sends a tensor of the default float type, and the other processes would gather it as keys.
        self.users.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self.chosen_rewards.append(torch.empty(0, dtype=torch.float32, device=self.device))
        self.rejected_rewards.append(torch.empty(0, dtype=torch.float32, device=self.device))

    @property
    def update_called(self) -> bool:
        """Always true, to prevent a warning: without pairs the values are NaN by definition."""
        return True

    def update(self, users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
        """Add pairs.

        Args:
            users: `[B]` int64 key of the user of each pair.
            chosen_rewards: `[B]` rewards of the chosen completions.
            rejected_rewards: `[B]` rewards of the rejected completions.

        Raises:
            ValueError: The shapes differ or are not `[B]`.
        """
        if not users.shape == chosen_rewards.shape == rejected_rewards.shape or users.ndim != 1:
            shapes = [list(tensor.shape) for tensor in (users, chosen_rewards, rejected_rewards)]
            raise ValueError(f"users, chosen_rewards and rejected_rewards must all be [B]; they are {shapes}.")
        self.users.append(users.long())
        self.chosen_rewards.append(chosen_rewards.detach().float())
        self.rejected_rewards.append(rejected_rewards.detach().float())

    def _rewards(self) -> tuple[Tensor, Tensor, Tensor]:
        return dim_zero_cat(self.users), dim_zero_cat(self.chosen_rewards), dim_zero_cat(self.rejected_rewards)


class PreferenceAccuracy(RewardsByUser):
    """Preference accuracy over pairs and over users.

    `compute()` returns the dictionary of `preference_accuracy`. A NaN reward makes every value that depends on it NaN.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy`, `accuracy_user_mean`, `accuracy_worst_decile` and `margin`, each a scalar."""
        return preference_accuracy(*self._rewards())

    def table(self) -> list[UserAccuracy]:
        """Return one row per user, over all processes; a collective that all of them must call."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return user_accuracies(*self._rewards())

    def margins(self) -> Tensor:
        """Return each pair's margin, `[N]`, over all processes; a collective that all of them must call."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            _, chosen, rejected = self._rewards()
            return chosen - rejected
