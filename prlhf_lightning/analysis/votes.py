"""Statistics of votes without a model: agreement between users, consistency, and spread between users.

N votes by U users on I items; an item is a response to a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prlhf_lightning.metrics.preference import Z_95, wilson_interval

Indices: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

_MOST_ITEMS = 500  # per user in the search for cycles, whose cost is cubic


@dataclass(frozen=True)
class Votes:
    """N votes: the preferred and the other item of each.

    Attributes:
        users: `[N]` index of the user of each vote, below `num_users`.
        winners: `[N]` index of the preferred item, below `num_items`.
        losers: `[N]` index of the other item.
        num_users: U.
        num_items: I.
    """

    users: Indices
    winners: Indices
    losers: Indices
    num_users: int
    num_items: int

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, which: Mask | Indices) -> Votes:
        """Return a selection of the votes, with the same users and items."""
        return replace(self, users=self.users[which], winners=self.winners[which], losers=self.losers[which])

    @property
    def pairs(self) -> Indices:
        """`[N]` key of each vote's two items, independent of the winner."""
        low, high = np.minimum(self.winners, self.losers), np.maximum(self.winners, self.losers)
        return low * self.num_items + high

    @property
    def sides(self) -> Mask:
        """`[N]` whether the item of the lower index won."""
        return self.winners < self.losers


@dataclass(frozen=True)
class Rate:
    """A share with its interval and count.

    Attributes:
        value: The share; NaN if the count is 0.
        low: Lower end of its 95% interval.
        high: Upper end.
        count: Number of cases.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class VoteRecord:
    """Counts of the votes of each user on each pair.

    Attributes:
        users: `[B]` the user.
        pairs: `[B]` the pair.
        first: `[B]` votes for the pair's item of the lower index.
        total: `[B]` votes.
    """

    users: Indices
    pairs: Indices
    first: Indices
    total: Indices

    @classmethod
    def of(cls, votes: Votes) -> VoteRecord:
        """Count votes."""
        pairs, pair = np.unique(votes.pairs, return_inverse=True)
        keys, group = np.unique(votes.users * len(pairs) + pair, return_inverse=True)
        first = np.bincount(group, weights=votes.sides, minlength=len(keys)).astype(np.int64)
        total = np.bincount(group, minlength=len(keys))
        return cls(keys // len(pairs), pairs[keys % len(pairs)], first, total)


def agreement_between_users(votes: Votes) -> Rate:
    """Return how often two users who voted on the same pair agree; every pair of items has equal weight.

    Chance is one half, since the order of the items is arbitrary. A user's opposite votes on a pair cancel. The
    interval is of the mean over pairs of items, assumed independent.
    """
    ballots = VoteRecord.of(votes)
    opinion = np.sign(2 * ballots.first - ballots.total)
    _, group = np.unique(ballots.pairs[opinion != 0], return_inverse=True)
    count = np.bincount(group).astype(float)
    ones = np.bincount(group, weights=opinion[opinion != 0] > 0)
    shared = count > 1
    count, ones = count[shared], ones[shared]
    alike = (ones * (ones - 1) + (count - ones) * (count - ones - 1)) / (count * (count - 1))
    return _mean(alike)


def contradictions(votes: Votes) -> Rate:
    """Return the share of contradictory judgments among all pairs that a user voted on twice or more.

    A judgment is contradictory if it has votes for both sides.
    """
    ballots = VoteRecord.of(votes)
    repeated = ballots.total > 1
    return _share(int(((ballots.first > 0) & (ballots.first < ballots.total)).sum()), int(repeated.sum()))


def cycles(votes: Votes) -> Rate:
    """Return the share of cyclic triples in a user's votes: a over b, b over c, c over a.

    The share is over triples in which the user has voted on each pair; random votes give a quarter. For users with more
    than 500 items, only the 500 with most votes are used.
    """
    ballots = VoteRecord.of(votes)
    decided = 2 * ballots.first != ballots.total
    order = np.argsort(ballots.users[decided], kind="stable")
    users, pairs = ballots.users[decided][order], ballots.pairs[decided][order]
    first_wins = (2 * ballots.first > ballots.total)[decided][order]
    low, high = pairs // votes.num_items, pairs % votes.num_items
    winners, losers = np.where(first_wins, low, high), np.where(first_wins, high, low)
    ends = np.flatnonzero(np.diff(users, append=-1)) + 1
    triples = round_trips = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if end - start < 3:
            continue
        items, places = np.unique(np.stack([winners[start:end], losers[start:end]]), return_inverse=True)
        above, below = places.reshape(2, -1)
        beats = np.zeros((len(items), len(items)), dtype=np.float32)
        beats[above, below] = 1
        if len(items) > _MOST_ITEMS:
            busiest = np.argsort(-(beats + beats.T).sum(0), kind="stable")[:_MOST_ITEMS]
            beats = beats[np.ix_(busiest, busiest)]
        either = beats + beats.T
        triples += round(float(np.sum(either @ either * either, dtype=np.float64)) / 6)
        round_trips += round(float(np.sum(beats @ beats * beats.T, dtype=np.float64)) / 3)
    return _share(round_trips, triples)


def spread_between_users(successes: Floats, totals: Floats) -> float:
    """Return the standard deviation of users' true rates, excluding the noise of few votes.

    The moment estimate: the variance between users' observed rates minus the expected binomial variance (DerSimonian &
    Laird 1986, with users as studies); 0 if chance explains all of it.

    Args:
        successes: `[U]` such as votes for the longer one.
        totals: `[U]` votes; users without any are left out.
    """
    there = totals > 0
    successes, totals = successes[there], totals[there]
    if len(totals) < 2:
        return 0.0
    rate = successes.sum() / totals.sum()
    noise = rate * (1 - rate)
    scatter = np.sum(totals * (successes / totals - rate) ** 2) - noise * (len(totals) - 1)
    weight = totals.sum() - np.sum(totals**2) / totals.sum()
    # The variance of a rate of n votes is tau² + (noise - tau²) / n: variance between users lowers the noise within.
    weight -= len(totals) - 1
    return float(np.sqrt(max(0.0, scatter / weight))) if weight > 0 else 0.0


def _share(some: int, of: int) -> Rate:
    return Rate(some / of, *wilson_interval(some / of, of), of) if of else Rate(np.nan, np.nan, np.nan, 0)


def _mean(values: Floats) -> Rate:
    if not len(values):
        return Rate(np.nan, np.nan, np.nan, 0)
    mean = float(values.mean())
    half = Z_95 * float(values.std()) / math.sqrt(len(values))
    return Rate(mean, max(0.0, mean - half), min(1.0, mean + half), len(values))
