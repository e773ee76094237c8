"""Running statistics of each user's rewards: advantages that are fair among users."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.advantages import EPSILON, group_deviations, sums_by

Baseline: TypeAlias = Literal["group", "user"]
"""What is subtracted from a reward: the mean of its group, or the user's running mean."""

_STATE = ("counts", "means", "degrees", "squares")


class UserScale(nn.Module):
    """Advantages `(R - baseline) / (σ_u + 1e-4)`, with σ_u a running standard deviation of the user's rewards.

    Divided by one σ for all, or by none, users whose rewards vary more get larger gradients. Divided by the σ of its
    group, a group that differs by a hair counts as much as one with a clear best answer. σ_u is neither.

    σ_u² is a moving average over about the user's last `window` completions, shrunk to the geometric mean over users,
    which counts as `prior_count` completions. A user who was never seen has that mean. In training each call first
    updates the statistics. They stand in the state dict, and grow when a larger row number appears.

    With `baseline="user"` it is P-GRPO (arXiv:2603.10009): deviations from the user's running mean, so that a single
    sample for a prompt is enough; the mean is shrunk like the variance.

    Groups with equal rewards change no σ_u under `baseline="group"`: they have no gradient to scale.

    All processes must pass the same: gather rewards, groups and users over them first.

    Args:
        window: Number of a user's recent completions in the averages.
        prior_count: Number of completions that the pooled values count for; 0 is no shrinkage.
        baseline: Subtract the mean of the group, or the user's running mean.
    """

    counts: Tensor
    means: Tensor
    degrees: Tensor
    squares: Tensor

    def __init__(self, window: float = 1000.0, prior_count: float = 16.0, baseline: Baseline = "group") -> None:
        super().__init__()
        if not 1 <= window < math.inf:
            raise ConfigurationError(f"UserScale: window is {window}; a running mean needs at least 1.")
        if not 0 <= prior_count < math.inf:
            raise ConfigurationError(f"UserScale: prior_count is {prior_count}; it must be 0 (no shrinkage) or more.")
        if baseline not in ("group", "user"):
            raise ConfigurationError(f"UserScale: baseline is {baseline!r}; it must be 'group' or 'user'.")
        self.window, self.prior_count, self.baseline = window, prior_count, baseline
        for name in _STATE:
            self.register_buffer(name, torch.zeros(0, dtype=torch.float32))

    def forward(self, rewards: Tensor, groups: Tensor, users: Tensor) -> Tensor:
        """Return the advantages `[B]`; in training, update the statistics first.

        Args:
            rewards: `[B]`, NaN for completions that could not be scored; these get 0.
            groups: `[B]` int64 group of each completion: those for one user and one prompt.
            users: `[B]` int64 row number of each completion's user.
        """
        if self.training:
            self.update(rewards, groups, users)
        if self.baseline == "group":
            deviations = group_deviations(rewards, groups)[0]
        else:
            deviations = (rewards - self.mean(users)).nan_to_num(0.0)
        return (deviations / (self.std(users) + EPSILON)).to(rewards.dtype)

    @torch.no_grad()
    def update(self, rewards: Tensor, groups: Tensor, users: Tensor) -> None:
        """Add a generation batch to the statistics; the order of its rows does not matter.

        Args:
            rewards: `[B]`, NaN for completions that could not be scored; these are not counted.
            groups: `[B]` int64.
            users: `[B]` int64.
        """
        scored = ~rewards.isnan()
        rewards, groups, users = rewards[scored].float(), groups[scored], users[scored]
        if not len(users):
            return
        size = max(len(self.counts), int(users.max()) + 1)
        for name in _STATE:
            table = getattr(self, name)
            setattr(self, name, F.pad(table, (0, size - len(table))))
        rows = sums_by(torch.ones_like(rewards), users, size)
        means = sums_by(rewards, users, size) / rows.clamp(min=1)
        decay = (1 - 1 / self.window) ** rows
        earlier = self.counts * decay
        self.counts = earlier + rows
        change = means - self.means
        share = rows / self.counts.clamp(min=1e-12)
        self.means = self.means + change * share
        if self.baseline == "group":
            deviations, _, groups = group_deviations(rewards, groups)
            varied = sums_by(deviations.abs(), groups, len(groups)) > 0
            # Of its n completions, a group has n - 1 degrees of freedom.
            free = (varied[groups] * (1 - 1 / torch.bincount(groups)[groups])).float()
            self.degrees = self.degrees * decay + sums_by(free, users, size)
            self.squares = self.squares * decay + sums_by(deviations.float() ** 2, users, size)
        else:  # Chan, Golub and LeVeque 1979: the squares of two parts, and those between their means
            within = sums_by((rewards - means[users]) ** 2, users, size)
            self.degrees = (self.counts - 1).clamp(min=0)
            self.squares = self.squares * decay + within + change**2 * earlier * share

    def std(self, users: Tensor) -> Tensor:
        """Return σ_u of the users of rows `[B]`, shrunk to that of all users pooled, `[B]`; 1 if nobody was seen.

        Logarithms are shrunk: an arithmetic mean would be that of the users whose rewards vary most. However small the
        others' σ is, σ_u² is at least the user's squares over `degrees + prior_count`; this limits the advantages.
        """
        known = self.degrees * (self.squares > 0)
        if not (total := known.sum()) > 0:
            return torch.ones(len(users), device=users.device)
        logs = torch.where(known > 0, (self.squares / self.degrees).log(), 0.0)
        degrees, squares = self._of(known, users), self._of(self.squares, users)
        shrunk = self._shrunk(self._of(known * logs, users), degrees, (known * logs).sum() / total)
        least = squares / (degrees + self.prior_count).clamp(min=1)
        return torch.maximum(shrunk.exp(), least).sqrt()

    def mean(self, users: Tensor) -> Tensor:
        """Return the running mean reward of the users of rows `[B]`, shrunk to that of all completions, `[B]`."""
        counts, means = self._of(self.counts, users), self._of(self.means, users)
        pooled = (self.counts * self.means).sum() / self.counts.sum().clamp(min=1e-12)
        return self._shrunk(counts * means, counts, pooled)

    def _shrunk(self, sums: Tensor, counts: Tensor, pooled: Tensor) -> Tensor:
        """Return the mean `[B]` of what a user has and of `prior_count` pooled values."""
        prior = max(self.prior_count, 1e-12)  # also without shrinkage, unseen users have the pooled value
        return (sums + prior * pooled) / (counts + prior)

    @staticmethod
    def _of(table: Tensor, users: Tensor) -> Tensor:
        """Return the values `[B]` of the users of rows; 0 for rows beyond the table."""
        return F.pad(table, (0, 1))[users.clamp(max=len(table))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the statistics in float32 under any cast: bfloat16 would round small steps away."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in _STATE:
            setattr(self, name, getattr(self, name).to(torch.float32))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of users from the state dict."""
        for name in _STATE:
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def worst_served_weights(served: Tensor, strength: float) -> Tensor:
    """Return a weight of each user with mean 1, larger the worse the user is served: `U softmax(-strength · served)`.

    Multiply advantages by it. It is the step of group DRO (arXiv:1911.08731, Algorithm 1) without its memory: what
    `served` remembers is enough, as `UserScale.mean`.

    Args:
        served: `[U]` how well each user is served, in a unit that all users share.
        strength: 0 for equal weights; at 1, a user who is served worse by 1 has e times the weight.
    """
    return len(served) * torch.softmax(-strength * served, dim=0)
