"""Simulated users with hidden preferences, in opposed groups, with differences within a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from prlhf_lightning.simulation.grammar import ATTRIBUTES, STYLES, Style, parse

# Mutually distant directions of preference; each gives two groups, the direction and its opposite.
_DIRECTIONS = ((1, 1, 1, 1, 1), (1, -1, 1, -1, -1), (-1, -1, 1, 1, -1), (1, -1, -1, 1, 1))
MAX_GROUPS = 2 * len(_DIRECTIONS)
# Weight of a group's first, second, ... attribute.
_IMPORTANCE = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class SimulatedUser:
    """A simulated user with hidden preferences over styles.

    Attributes:
        user_id: The id in the data.
        group: The user's hidden group, counted from 0.
        weights: Signed weight of each attribute's score, in the order of `ATTRIBUTES`; absolute values sum to 1.
    """

    user_id: str
    group: int
    weights: tuple[float, ...]

    def style_utility(self, style: Style) -> float:
        """Return the utility of any text in a style, in [-1, 1].

        1 is the best style for this user; 0 is the mean over all styles, the score of a model without a style. (Scores
        of each attribute are symmetric about 0, so the weighted sum needs no rescaling.)
        """
        return math.fsum(weight * score for weight, score in zip(self.weights, style.scores, strict=True))

    def utility(self, prompt: str, text: str) -> float:
        """Return the utility of a text as an answer to a prompt; -1, that of the worst style, if it is ill-formed."""
        style = parse(prompt, text)
        return -1.0 if style is None else self.style_utility(style)

    @property
    def best_style(self) -> Style:
        """The style with the highest utility."""
        return max(STYLES, key=self.style_utility)

    def stated_preference(self, attributes: int = 3) -> str:
        """Return a statement of the user's strongest preferences, such as `I like short and warm answers.`."""
        ranked = sorted(ATTRIBUTES, key=lambda name: -abs(self.weights[list(ATTRIBUTES).index(name)]))
        return state_preference([getattr(self.best_style, name) for name in ranked[:attributes]])


def state_preference(values: Sequence[str]) -> str:
    """Return a sentence that states preferred attribute values, as in `I like short, casual and warm answers.`."""
    *head, last = values
    return f"I like {', '.join(head)}{' and ' if head else ''}{last} answers."


def draw_tastes(groups: int, rng: Random) -> list[tuple[float, ...]]:
    """Draw the mean weights of each group.

    Groups 2i and 2i + 1 have opposite weights, so no text suits both.

    Args:
        groups: Number of groups, 1 to `MAX_GROUPS`.
        rng: Source of all randomness.
    """
    flips = [rng.choice((-1, 1)) for _ in ATTRIBUTES]  # so preferences differ between seeds
    tastes: list[tuple[float, ...]] = []
    for direction in _DIRECTIONS:
        importance = rng.sample(_IMPORTANCE, len(_IMPORTANCE))
        taste = [sign * flip * weight for sign, flip, weight in zip(direction, flips, importance, strict=True)]
        tastes += [tuple(taste), tuple(-weight for weight in taste)]
    return tastes[:groups]


def draw_users(
    names: Sequence[str], tastes: Sequence[Sequence[float]], rng: Random, shares: Sequence[float] | None = None
) -> list[SimulatedUser]:
    """Draw one user per name, around the weights of a group.

    The sizes of the groups are proportional to `shares`; by default, the first is about twice as large as the last.
    Within a group, weights vary by up to 20%, and 30% of the users disagree with their group on their least important
    attribute.
    """
    users = []
    for name, group in zip(names, _assign(len(names), shares or _falling(len(tastes))), strict=True):
        weights = [weight * rng.uniform(0.8, 1.2) for weight in tastes[group]]
        if rng.random() < 0.3:
            weights[min(range(len(weights)), key=lambda i: abs(weights[i]))] *= -1
        total = math.fsum(map(abs, weights))
        users.append(SimulatedUser(name, group, tuple(weight / total for weight in weights)))
    return users


def best_common_utility(users: Sequence[SimulatedUser]) -> float:
    """Return the highest mean utility of a single style: the upper bound of any model that ignores users."""
    return max(math.fsum(user.style_utility(style) for user in users) / len(users) for style in STYLES)


def _falling(groups: int) -> list[float]:
    """Return shares of groups of which the first is about twice as large as the last."""
    return [float(2 * max(groups - 1, 1) - group) for group in range(groups)]


def _assign(users: int, shares: Sequence[float]) -> list[int]:
    """Return the group of each user."""
    return [group for group, size in enumerate(apportion(users, shares)) for _ in range(size)]


@dataclass(frozen=True)
class Member:
    """A simulated user with hidden weights of scores.

    Attributes:
        user_id: The id in the data.
        group: The hidden group, counted from 0.
        weights: Weight of each score; their squares sum to 1.
    """

    user_id: str
    group: int
    weights: tuple[float, ...]

    def utility(self, scores: Sequence[float]) -> float:
        """Return the user's utility of an answer with these scores."""
        return math.fsum(weight * score for weight, score in zip(self.weights, scores, strict=True))


def draw_members(
    names: Sequence[str], groups: Sequence[Sequence[float]], shares: Sequence[float], spread: float, rng: Random
) -> list[Member]:
    """Draw one user per name.

    Args:
        names: The users' ids.
        groups: Weight of each score for each group.
        shares: Relative size of each group; users are assigned to groups at random.
        spread: Each weight of a user is the group's times a number drawn from `1 - spread` to `1 + spread`.
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
    """Draw each user's number of votes: proportional to `r ** -zipf` for the user of rank r, and at least one.

    Args:
        users: Number of users; ranks are random, so they do not depend on preferences.
        mean: Mean number of votes; their sum is `users * mean`.
        zipf: Exponent of Zipf's law. 0 gives equal numbers; 1 to 1.5 are common among volunteers.
        rng: Source of all randomness.
    """
    rest = apportion(users * (mean - 1), [(rank + 1) ** -zipf for rank in range(users)])
    votes = [1 + count for count in rest]
    rng.shuffle(votes)
    return votes


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number into integers proportional to shares, with largest-remainder rounding."""
    exact = [total * share / math.fsum(shares) for share in shares]
    parts = [int(part) for part in exact]
    for place in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: total - sum(parts)]:
        parts[place] += 1
    return parts
