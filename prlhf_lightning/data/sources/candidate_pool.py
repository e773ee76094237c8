"""Pool of scored answers to prompts, for `PoolSource`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.simulation.scores import Score

_SCHEMA = Schema("a pool of answers", 'write {"prompt": "...", "responses": ["...", "..."]}')


@dataclass(frozen=True)
class Candidates:
    """The distinct answers to one prompt.

    Attributes:
        prompt: The prompt.
        answers: `[A]` answers.
        scores: `[A][S]` scores of the answers, in standard deviations of the pool.
    """

    prompt: str
    answers: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]


class Pool:
    """All prompts with at least two distinct answers.

    Args:
        rows: Locations and rows, with `prompt`, `responses` and lists of numbers, one per response.
        names: Names of the scores.
        functions: Functions of the scores that are not columns of the rows.

    Attributes:
        candidates: The candidates of each prompt, in order.
        scales: `[S]` standard deviation of each score among the answers to one prompt, in the score's unit.
        few: Number of prompts left out because they have fewer than two answers.

    Raises:
        FeedbackFormatError: A row is malformed, or a score is not a finite number.
        ConfigurationError: A score is unknown, or is equal for all answers to each prompt.
    """

    def __init__(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], names: Sequence[str], functions: Mapping[str, Score]
    ) -> None:
        raw: dict[str, dict[str, tuple[float, ...]]] = {}
        for where, row in rows:
            prompt = _SCHEMA.get(row, where, "prompt", kind=str)
            known = raw.setdefault(prompt, {})
            answers = _answers(row, where)
            columns = [_column(row, where, name, prompt, answers, functions) for name in names]
            for answer, scores in zip(answers, zip(*columns, strict=True), strict=True):
                known.setdefault(answer, scores)
        asked = {prompt: known for prompt, known in raw.items() if len(known) > 1}
        self.few = len(raw) - len(asked)
        self.scales = _scales(asked.values(), names)
        self.candidates = {
            prompt: Candidates(prompt, tuple(known), tuple(self.scaled(scores) for scores in known.values()))
            for prompt, known in asked.items()
        }

    def scaled(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Return scores divided by `scales`."""
        return tuple(score / scale for score, scale in zip(scores, self.scales, strict=True))


def pairs_in_random_order(
    candidates: Sequence[Candidates], rng: Random
) -> Iterator[tuple[Candidates, tuple[int, int]]]:
    """Yield every pair of answers to one prompt once; lazily, without listing all pairs at first."""
    total = sum(math.comb(len(one.answers), 2) for one in candidates)
    seen: set[tuple[int, int, int]] = set()
    tries = 0
    while 2 * len(seen) < total and tries < 2 * total:
        tries += 1
        number = rng.randrange(len(candidates))
        first, second = rng.sample(range(len(candidates[number].answers)), 2)
        key = (number, min(first, second), max(first, second))
        if key not in seen:
            seen.add(key)
            yield candidates[number], (first, second)
    rest = [
        (number, first, second)
        for number, one in enumerate(candidates)
        for first, second in combinations(range(len(one.answers)), 2)
        if (number, first, second) not in seen
    ]
    rng.shuffle(rest)
    for number, first, second in rest:
        yield candidates[number], (first, second) if rng.random() < 0.5 else (second, first)


def finite(value: Any, name: str, where: str) -> float:
    """Return a score as a float.

    Raises:
        FeedbackFormatError: It is not a finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        fix = "mend what gives it, or the answer"
        raise FeedbackFormatError(f"score {name!r} is not a finite number", fix, where=where)
    return number


def _answers(row: Mapping[str, Any], where: str) -> list[str]:
    count = len(_SCHEMA.get(row, where, "responses", kind=list))
    answers = [_SCHEMA.get(row, where, "responses", place, kind=str) for place in range(count)]
    for place, answer in enumerate(answers):
        if not answer.strip():
            _SCHEMA.fail(where, ("responses", place), "is empty")
    return answers


def _column(
    row: Mapping[str, Any],
    where: str,
    name: str,
    prompt: str,
    answers: Sequence[str],
    functions: Mapping[str, Score],
) -> list[float]:
    """Return one score for each answer of a row, from its column or otherwise its function."""
    if name in row:
        values = _SCHEMA.get(row, where, name, kind=list)
        if len(values) != len(answers):
            problem = f"has {len(values)} numbers for {len(answers)} responses"
            _SCHEMA.fail(where, (name,), problem, "has not one number for each response")
        return [_SCHEMA.number(row, where, name, place) for place in range(len(values))]
    if name not in functions:
        raise ConfigurationError(
            f"there is no score {name!r}; it is no column of the row, and the functions are "
            f"{', '.join(sorted(functions))}.",
            where=where,
            kind=f"there is no score {name!r}",
        )
    return [finite(functions[name](prompt, answer), name, where) for answer in answers]


def _scales(pool: Iterable[Mapping[str, Sequence[float]]], names: Sequence[str]) -> tuple[float, ...]:
    """Return the standard deviation of each score about the means of the prompts."""
    squares, freedom = [0.0] * len(names), 0
    for answers in pool:
        freedom += len(answers) - 1
        for place, values in enumerate(zip(*answers.values(), strict=True)):
            mean = math.fsum(values) / len(values)
            squares[place] += math.fsum((value - mean) ** 2 for value in values)
    if not freedom:
        raise ConfigurationError("pool: no prompt has two different answers; add answers to choose from.")
    for name, square in zip(names, squares, strict=True):
        if not square:
            raise ConfigurationError(f"groups: score {name!r} is equal for all answers to each prompt; leave it out.")
    return tuple(math.sqrt(square / freedom) for square in squares)
