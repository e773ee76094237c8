"""Ratings and rankings of several completions to pairs of two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias, get_args

from prlhf_lightning.data.records import Text
from prlhf_lightning.data.sources.derived import left_out
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.errors import ConfigurationError

Which: TypeAlias = Literal["all", "adjacent"]


class Rated(NamedTuple):
    """A completion, what a user thought of it (more is better), and where that stands."""

    completion: Text
    score: float
    where: str


class Pair(NamedTuple):
    """Two completions of which a user thought differently."""

    chosen: Rated
    rejected: Rated


@dataclass(frozen=True)
class Pairing:
    """Which pairs are made of what one user thought of several completions of one prompt.

    Attributes:
        which: `all` pairs of different scores, or those of `adjacent` ones alone: each completion against those of the
            next lower score.
        min_gap: Least difference of the scores; pairs closer than this are left out.
        max_pairs: Most pairs of one user and prompt; which are kept is drawn at random, whatever their gap.
        seed: Draws them.
    """

    which: Which = "all"
    min_gap: float = 0.0
    max_pairs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in get_args(Which):
            raise ConfigurationError(f"pairs is {self.which!r}; it must be one of {get_args(Which)}.")
        if not self.min_gap >= 0:
            raise ConfigurationError(f"min_gap is {self.min_gap}; it must be at least 0.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ConfigurationError(f"max_pairs is {self.max_pairs}; it must be at least 1, or null for all pairs.")

    def __call__(self, rated: Sequence[Rated], owner: str, counts: Counter[str]) -> list[Pair]:
        """Return the pairs, in the order in which the completions came.

        Args:
            rated: What one user thought of completions of one prompt.
            owner: User and prompt, from which it is drawn what `max_pairs` keeps.
            counts: Where pairs that are left out are counted.
        """
        pairs = [pair for pair in self._candidates(rated, counts) if self._differs(pair, counts)]
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            counts[left_out(f"over max_pairs={self.max_pairs} of a user and prompt")] += len(pairs) - self.max_pairs
            draw = sorted(range(len(pairs)), key=lambda i: text_key(f"{self.seed} {owner} {i}"))
            pairs = [pairs[i] for i in sorted(draw[: self.max_pairs])]
        return pairs

    def _candidates(self, rated: Sequence[Rated], counts: Counter[str]) -> Iterator[Pair]:
        levels = sorted({one.score for one in rated}, reverse=True)
        level = {score: number for number, score in enumerate(levels)}
        for first, second in combinations(rated, 2):
            better, worse = (first, second) if first.score > second.score else (second, first)
            distance = level[worse.score] - level[better.score]
            if distance == 0:
                counts[left_out("equal scores")] += 1
            elif self.which == "all" or distance == 1:
                yield Pair(better, worse)

    def _differs(self, pair: Pair, counts: Counter[str]) -> bool:
        if pair.chosen.completion == pair.rejected.completion:
            counts[left_out("one completion with two scores")] += 1
            return False
        if pair.chosen.score - pair.rejected.score < self.min_gap:
            counts[left_out(f"scores closer than min_gap={self.min_gap:g}")] += 1
            return False
        return True


def ranked(completions: Iterable[Text], where: str) -> list[Rated]:
    """Return completions that stand best first as rated ones, one point apart."""
    return [Rated(completion, -float(place), where) for place, completion in enumerate(completions)]
