"""How well rewards tell what each user liked from what they disliked, where feedback is one completion a row.

The measure is the area under the ROC curve within each user: the probability that a completion that the user liked has
a higher reward than one that they disliked. It needs no threshold, does not depend on how often a user likes things
(as a share of right guesses does), and is what accuracy is for pairs: chance is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.metrics.preference import RewardsByUser


@dataclass(frozen=True)
class UserAUC:
    """The thumbs of one user.

    Attributes:
        user: The user's key.
        ups: Number of completions that the user liked.
        downs: Number of completions that the user disliked.
        auc: Share of the pairs of a liked and a disliked completion in which the liked one has the higher reward; ties
            count as half. NaN for a user who liked all or none.
        gap: Mean reward of liked less that of disliked completions.
    """

    user: int
    ups: int
    downs: int
    auc: float
    gap: float


def user_aucs(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> list[UserAUC]:
    """Return one row a user, in ascending order of their keys.

    Args:
        users: `[B]` int64 key of the user of each row.
        chosen_rewards: `[B]` reward of the row's completion if it was liked, else NaN.
        rejected_rewards: `[B]` reward of the row's completion if it was disliked, else NaN.
    """
    keys, ups, downs, wins, gaps = _by_user(users, chosen_rewards, rejected_rewards)
    columns = (keys, ups, downs, wins / (ups * downs), gaps)
    return [UserAUC(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def unpaired_auc(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Return areas under the ROC curve, and the gap between mean rewards; NaN where nobody liked some and not others.

    Args:
        users: `[B]` int64 key of the user of each row.
        chosen_rewards: `[B]` reward of the row's completion if it was liked, else NaN.
        rejected_rewards: `[B]` reward of the row's completion if it was disliked, else NaN.

    Returns:
        `auc` over all pairs of a liked and a disliked completion of the same user, `auc_user_mean` over users who have
        such pairs, `auc_worst_decile` over the tenth of them with the lowest (rounded down, at least one user), and
        `reward_gap`, the mean reward of all liked less that of all disliked completions.
    """
    _, ups, downs, wins, _ = _by_user(users, chosen_rewards, rejected_rewards)
    both = ups * downs > 0
    by_user = (wins / (ups * downs))[both]
    return {
        "auc": (wins[both].sum() / (ups * downs)[both].sum()).float(),
        "auc_user_mean": by_user.mean().float(),
        "auc_worst_decile": by_user.sort().values[: max(1, len(by_user) // 10)].mean().float(),
        "reward_gap": chosen_rewards.nanmean() - rejected_rewards.nanmean(),
    }


def _by_user(
    users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return for each user, `[U]`: key, liked, disliked, pairs ranked right (Mann-Whitney's U), and gap of rewards."""
    up = ~chosen_rewards.isnan()
    rewards = torch.where(up, chosen_rewards, rejected_rewards).double()
    keys, user = torch.unique(users, return_inverse=True)
    order = rewards.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]  # by user, then by reward
    sorted_user, sorted_rewards = user[order], rewards[order]
    # The rank of each row within its user, ties sharing their mean rank.
    starts = torch.searchsorted(sorted_user, torch.arange(len(keys), device=user.device))
    ranks = torch.arange(1, len(order) + 1, device=user.device) - starts[sorted_user]
    ties = torch.stack([sorted_user.double(), sorted_rewards], dim=1)
    _, tie, sizes = torch.unique_consecutive(ties, dim=0, return_inverse=True, return_counts=True)
    mean_ranks = (ranks.double().new_zeros(len(sizes)).index_add(0, tie, ranks.double()) / sizes)[tie]

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(keys)).index_add(0, sorted_user, values)

    liked = up[order].double()
    ups, downs = total(liked), total(1 - liked)
    wins = total(mean_ranks * liked) - ups * (ups + 1) / 2
    wins = wins + 0 * total(sorted_rewards)  # NaN where a reward is
    gaps = total(sorted_rewards * liked) / ups - total(sorted_rewards * (1 - liked)) / downs
    return keys, ups.long(), downs.long(), wins, gaps


class UnpairedAUC(RewardsByUser):
    """Area under the ROC curve over users.

    `compute()` returns the dictionary of `unpaired_auc`. Of the two rewards of a row one is NaN; where both are, the
    values that rest on them are NaN.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return `auc`, `auc_user_mean`, `auc_worst_decile` and `reward_gap`, each a scalar."""
        return unpaired_auc(*self._rewards())

    def table(self) -> list[UserAUC]:
        """Return one row a user, over all processes; under distributed runs all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return user_aucs(*self._rewards())
