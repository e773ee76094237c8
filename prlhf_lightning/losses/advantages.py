"""Advantages of sampled completions within groups: the completions for one user and one prompt.

Rewards are `[B]`; NaN marks a completion that could not be scored. It gets advantage 0, and no mean or standard
deviation counts it. `groups` `[B]` int64 names the group of each completion; groups may be of any sizes and in any
order. All completions of a group must be there: gather rewards over processes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to standard deviations, as in TRL."""


def sums_by(values: Tensor, groups: Tensor, size: int) -> Tensor:
    """Return the sum of the values `[B]` of each group, `[size]`."""
    return values.new_zeros(size).index_add(0, groups, values)


def group_deviations(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what all advantages are made of, each `[B]`: deviations, numbers of scored rewards, groups from 0.

    The deviation from the group's mean is exactly 0 where all rewards of a group are equal up to rounding: otherwise
    dividing by the standard deviation of rounding errors would make a signal of them.

    Args:
        rewards: `[B]`.
        groups: `[B]` int64.
    """
    groups = torch.unique(groups, return_inverse=True)[1]
    scored = ~rewards.isnan()
    size = int(groups.max()) + 1 if len(groups) else 0
    values = torch.where(scored, rewards, 0.0).double()
    counts = sums_by(scored.double(), groups, size)
    deviations = torch.where(scored, values - (sums_by(values, groups, size) / counts.clamp(min=1))[groups], 0.0)
    largest = torch.zeros_like(counts).scatter_reduce(0, groups, values.abs(), "amax")
    spread = torch.zeros_like(counts).scatter_reduce(0, groups, deviations.abs(), "amax")
    rounding = 8 * torch.finfo(rewards.dtype).eps * largest
    return torch.where((spread > rounding)[groups], deviations, 0.0), counts[groups], groups


def centered_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return `R - mean_g`, `[B]`: Dr. GRPO (arXiv:2503.20783).

    Args:
        rewards: `[B]`, NaN for completions that could not be scored.
        groups: `[B]` int64.
    """
    return group_deviations(rewards, groups)[0].to(rewards.dtype)


def group_scaled_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return `(R - mean_g) / (std_g + 1e-4)`, `[B]`: GRPO (arXiv:2402.03300), with the unbiased standard deviation.

    Args:
        rewards: `[B]`, NaN for completions that could not be scored.
        groups: `[B]` int64.
    """
    deviations, counts, groups = group_deviations(rewards, groups)
    squares = sums_by(deviations**2, groups, len(groups))[groups]
    std = (squares / (counts - 1).clamp(min=1)).sqrt()
    return (deviations / (std + EPSILON)).to(rewards.dtype)


def batch_scaled_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return `(R - mean_g) / (std + 1e-4)`, `[B]`, with the standard deviation of all rewards (arXiv:2508.08221).

    Users whose rewards vary more get larger advantages; `UserScale` gives them equal ones.

    Args:
        rewards: `[B]`, NaN for completions that could not be scored.
        groups: `[B]` int64.
    """
    scored = rewards[~rewards.isnan()].double()
    std = scored.std() if len(scored) > 1 else scored.new_zeros(())
    return (group_deviations(rewards, groups)[0] / (std + EPSILON)).to(rewards.dtype)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return the reward minus the mean of the others in its group, `[B]`: RLOO (arXiv:2402.14740).

    A completion that is the only scored one of its group gets 0. There is no division by the standard deviation of the
    others: it is 0 or a rounding error where they are equal, and the advantage then is in the thousands.

    Args:
        rewards: `[B]`, NaN for completions that could not be scored.
        groups: `[B]` int64.
    """
    deviations, counts, _ = group_deviations(rewards, groups)
    return (deviations * counts / (counts - 1).clamp(min=1)).to(rewards.dtype)
