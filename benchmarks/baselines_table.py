"""The table of `baselines.py`: accuracies and gains with intervals over people and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_SAMPLES, _SPLITS = 2000, 20
_TENTH = 10


@dataclass(frozen=True)
class Outcomes:
    """What one method ranked right, on the same N validation pairs for all methods.

    Attributes:
        own: `[S, N]` for each seed 1 for a pair that is ranked right, 0.5 for a tie, else 0.
        generic: `[S, N]` the same for the method's own generic user; None for methods without users.
    """

    own: Floats
    generic: Floats | None = None

    @classmethod
    def of(cls, margins: Sequence[Floats], generic: Sequence[Floats] | None) -> Outcomes:
        """Return the outcomes of margins `[N]` of each seed."""
        return cls(_right(margins), None if generic is None else _right(generic))


def _right(margins: Sequence[Floats]) -> Floats:
    return (np.sign(np.stack(margins)) + 1) / 2


def worst_tenth(right: Floats, users: npt.NDArray[np.int64], cells: npt.NDArray[np.int64], seed: int = 0) -> Floats:
    """Return weights `[N]` of the pairs of the tenth of people who are ranked worst, chosen on other pairs.

    The responses that a person judged are divided at random into two halves. People are ordered by the pairs within
    one half, and the pairs within the other half get the weights, so that a low value by chance is not counted as a
    low value. This is done both ways for several divisions. Each person of a tenth has the same weight.

    Args:
        right: `[N]` outcomes of the method that orders people, mean over seeds.
        users: `[N]` the person of each pair, from 0.
        cells: `[2, N]` key of person and response, for chosen and rejected.
        seed: Seed of the divisions.
    """
    draw = np.random.default_rng(seed)
    distinct, place = np.unique(cells, return_inverse=True)
    place, weights, count = place.reshape(cells.shape), np.zeros(len(users)), users.max() + 1
    for _ in range(_SPLITS):
        half = draw.integers(2, size=len(distinct))[place]
        for chooses in (0, 1):
            by, measured = (half == chooses).all(0), (half == 1 - chooses).all(0)
            there = np.bincount(users[by], minlength=count) > 0
            there &= np.bincount(users[measured], minlength=count) > 0
            people = draw.permutation(np.flatnonzero(there))  # ties in random order
            share = np.bincount(users[by], right[by], count) / np.bincount(users[by], minlength=count).clip(1)
            worst = people[np.argsort(share[people], kind="stable")[: max(1, len(people) // _TENTH)]]
            used = measured & np.isin(users, worst)
            if used.any():
                weights[used] += 1 / np.bincount(users[used], minlength=count)[users[used]]
    return weights


def summary(
    outcomes: Mapping[str, Outcomes],
    users: npt.NDArray[np.int64],
    cells: npt.NDArray[np.int64],
    reference: str,
    seed: int = 0,
) -> dict[str, dict[str, list[float] | None]]:
    """Return for each method its accuracies and gains, each as `[value, low, high]` of a 95% interval.

    The intervals are percentiles of a bootstrap that draws people and seeds, the same for all methods.

    Args:
        outcomes: Outcomes by method.
        users: `[N]` the person of each pair, from 0.
        cells: `[2, N]` as in `worst_tenth`.
        reference: The method that gains are over, and by which the worst tenth is chosen.
        seed: Seed of the bootstrap.
    """
    weights = {
        "pooled": np.ones(len(users)),
        "by_person": 1 / np.bincount(users)[users],
        "worst_tenth": worst_tenth(outcomes[reference].own.mean(0), users, cells, seed),
    }
    return {
        name: {
            **{key: _interval(found.own, weight, users, seed) for key, weight in weights.items()},
            "gain": _interval(_minus(found.own, outcomes[reference].own), weights["by_person"], users, seed)
            if name != reference
            else None,
            "gain_over_generic": None
            if found.generic is None
            else _interval(found.own - found.generic, weights["by_person"], users, seed),
            "generic_pooled": None
            if found.generic is None
            else _interval(found.generic, weights["pooled"], users, seed),
        }
        for name, found in outcomes.items()
    }


def interval_over_people(values: Floats, users: npt.NDArray[np.int64], seed: int = 0) -> list[float]:
    """Return the mean over people of their mean values, and its 95% interval.

    Args:
        values: `[N]` float.
        users: `[N]` the person of each value.
        seed: Seed of the bootstrap.
    """
    people = np.unique(users, return_inverse=True)[1]
    found = _interval(values[None], 1 / np.bincount(people)[people], people, seed)
    if found is None:
        raise ValueError("There are no values.")
    return found


def _minus(one: Floats, other: Floats) -> Floats:
    """Return differences seed by seed, or of the means over seeds if the numbers of seeds differ."""
    return one - other if len(one) == len(other) else one.mean(0, keepdims=True) - other.mean(0)


def _interval(values: Floats, weights: Floats, users: npt.NDArray[np.int64], seed: int) -> list[float] | None:
    """Return the weighted mean of values `[S, N]` and its interval; None if no pair has a weight."""
    if not weights.any():
        return None
    sums = np.stack([np.bincount(users, weights * row) for row in values])  # [S, U]
    totals = np.bincount(users, weights)
    draw, means = np.random.default_rng(seed), []
    for _ in range(_SAMPLES):
        drawn = draw.integers(len(totals), size=len(totals))
        rows = draw.integers(len(values), size=len(values))
        if totals[drawn].any():
            means.append(sums[rows][:, drawn].sum() / (len(values) * totals[drawn].sum()))
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(sums.sum() / (len(values) * totals.sum())), float(low), float(high)]
