"""AUC of rewards on unpaired feedback, within each user.

The area under the ROC curve of a user is the probability that a liked completion has a higher reward than a disliked
one. It needs no threshold and does not depend on the user's share of likes, unlike classification accuracy. It is the
counterpart of accuracy on pairs: chance is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.metrics.preference import RewardsByUser


@dataclass(frozen=True)
class UserAUC:
    """AUC of one user.

    Attributes:
        user: The user's key.
        ups: Number of completions that the user liked.
        downs: Number of completions that the user disliked.
        auc: Share of pairs of a liked and a disliked completion in which the liked one has the higher reward; ties
            count as half. NaN for a user who liked all or none.
        gap: Mean reward of liked minus that of disliked completions.
    """

    user: int
    ups: int
    downs: int
    auc: float
    gap: float


def user_aucs(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> list[UserAUC]:
    """Return one row per user, in ascending order of keys.

    Args:
        users: `[B]` int64 key of the user of each row.
        chosen_rewards: `[B]` reward of the row's completion if it was liked, else NaN.
        rejected_rewards: `[B]` reward of the row's completion if it was disliked, else NaN.
    """
    keys, ups, downs, wins, gaps = _by_user(users, chosen_rewards, rejected_rewards)
    columns = (keys, ups, downs, wins / (ups * downs), gaps)
    return [UserAUC(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def unpaired_auc(users: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Return AUCs and the gap between mean rewards; NaN if no user has both liked and disliked completions.

    Args:
        users: `[B]` int64 key of the user of each row.
        chosen_rewards: `[B]` reward of the row's completion if it was liked, else NaN.
        rejected_rewards: `[B]` reward of the row's completion if it was disliked, else NaN.

    Returns:
        `auc` over all pairs of a liked and a disliked completion of the same user, `auc_user_mean` over users with such
        pairs, `auc_worst_decile` over the tenth of these users with the lowest AUC (rounded down, at least one user),
        and `reward_gap`, the mean reward of all liked minus that of all disliked completions.
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
    """Return for each user, `[U]`: key, liked, disliked, correctly ranked pairs (Mann-Whitney U), and reward gap."""
    up = ~chosen_rewards.isnan()
    rewards = torch.where(up, chosen_rewards, rejected_rewards).double()
    keys, user = torch.unique(users, return_inverse=True)
    order = rewards.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]  # by user, then by reward
    sorted_user, sorted_rewards = user[order], rewards[order]
    # Rank of each row within its user; ties share their mean rank.
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
    wins = wins + 0 * total(sorted_rewards)  # propagates NaN rewards
    gaps = total(sorted_rewards * liked) / ups - total(sorted_rewards * (1 - liked)) / downs
    return keys, ups.long(), downs.long(), wins, gaps


class UnpairedAUC(RewardsByUser):
    """Area under the ROC curve over users.

    `compute()` returns the dictionary of `unpaired_auc`. One of the two rewards of a row is NaN. If both are, the
    values that depend on them are NaN.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return `auc`, `auc_user_mean`, `auc_worst_decile` and `reward_gap`, each a scalar."""
        return unpaired_auc(*self._rewards())

    def table(self) -> list[UserAUC]:
        """Return one row per user, over all processes; a collective that all of them must call."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return user_aucs(*self._rewards())
