"""Win rates, as means over users with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prlhf_lightning.analysis.personalization_gain import bootstrap


@dataclass(frozen=True)
class UserMean:
    """A mean over users of each user's mean.

    Attributes:
        value: The mean; NaN without values.
        low: Lower end of its 95% interval, a bootstrap over users; NaN with fewer than two of them.
        high: Upper end of the interval.
        users: Number of users with values.
        count: Number of values.
    """

    value: float
    low: float
    high: float
    users: int
    count: int


def user_mean(users: Sequence[str], values: Sequence[float] | npt.NDArray[np.float64], seed: int = 0) -> UserMean:
    """Return the mean over users of their means, with a bootstrap interval over users.

    A win rate is the mean of scores of 1 (won), 0.5 (tie) and 0 (lost).

    Args:
        users: N ids.
        values: `[N]` values; NaN is ignored.
        seed: Seed of the bootstrap samples.
    """
    kept = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(kept)
    if not there.any():
        return UserMean(np.nan, np.nan, np.nan, 0, 0)
    _, codes = np.unique(np.asarray(users)[there], return_inverse=True)
    means = np.bincount(codes, weights=kept[there]) / np.bincount(codes)
    low, high = bootstrap(means, np.ones_like(means), seed) if len(means) > 1 else (np.nan, np.nan)
    return UserMean(float(means.mean()), low, high, len(means), int(there.sum()))
