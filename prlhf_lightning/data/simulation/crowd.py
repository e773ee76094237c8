"""Simulated users as a crowd: who is of which hidden group, who wants what, and who votes how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Member:
    """A simulated user.

    Attributes:
        user_id: The id that stands in the data.
        group: The hidden group, counted from 0.
        weights: Weight of each score; their squares sum to 1.
    """

    user_id: str
    group: int
    weights: tuple[float, ...]

    def utility(self, scores: Sequence[float]) -> float:
        """Return what an answer with these scores is worth to the user."""
        return math.fsum(weight * score for weight, score in zip(self.weights, scores, strict=True))


def draw_members(
    names: Sequence[str], groups: Sequence[Sequence[float]], shares: Sequence[float], spread: float, rng: Random
) -> list[Member]:
    """Draw a user for each name.

    Args:
        names: The users' ids.
        groups: Weight of each score for each group.
        shares: Size of each group beside the others'; which user is in which group is drawn.
        spread: Each weight of a user is its group's times a number drawn from `1 - spread` to `1 + spread`.
        rng: Source of all randomness.
    """
    assigned = apportion(len(names), shares)
    places = [group for group, size in enumerate(assigned) for _ in range(size)]
    rng.shuffle(places)
    members = []
    for name, group in zip(names, places, strict=True):
        weights = [weight * rng.uniform(1 - spread, 1 + spread) for weight in groups[group]]
        norm = math.hypot(*weights)
        members.append(Member(name, group, tuple(weight / norm for weight in weights)))
    return members


def draw_votes(users: int, mean: int, zipf: float, rng: Random) -> list[int]:
    """Draw how often each user votes: the user of rank r in proportion to `r ** -zipf`, and everybody once at least.

    Args:
        users: Number of users; ranks are drawn, so that they have nothing to do with tastes.
        mean: Mean number of votes; their sum is `users * mean`.
        zipf: Exponent of Zipf's law. 0 is equally often; 1 to 1.5 are common among people who volunteer.
        rng: Source of all randomness.
    """
    rest = apportion(users * (mean - 1), [(rank + 1) ** -zipf for rank in range(users)])
    votes = [1 + count for count in rest]
    rng.shuffle(votes)
    return votes


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number into whole parts in proportion to shares, by largest remainder."""
    exact = [total * share / math.fsum(shares) for share in shares]
    parts = [int(part) for part in exact]
    for place in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: total - sum(parts)]:
        parts[place] += 1
    return parts
