"""Scores of several answers from a judge of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from prlhf_lightning.analysis.judges.base import Judge, Person, Question, judge_pair
from prlhf_lightning.data.conversations import plain_text
from prlhf_lightning.data.records import Text


class JudgeScorer:
    """Scores answers by a judge: the share of the other answers to the same prompt and user that an answer beats.

    A tie counts as half. n different answers take n (n - 1) / 2 questions.

    Args:
        judge: The judge, prepared.
        people: What the judge may know about users, by id.
    """

    def __init__(self, judge: Judge, people: Mapping[str, Person] | None = None) -> None:
        self._judge, self._people = judge, people or {}

    def score(
        self,
        user_ids: Sequence[str],
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the scores `[n]` float64, in [0, 1]; NaN where the judge had no verdict, or nothing to compare.

        Answers are compared with those of equal user and prompt among the given ones.
        """
        about = user_texts or [""] * len(user_ids)
        groups: dict[tuple[str, str], list[int]] = {}
        for place, key in enumerate(zip(user_ids, map(repr, prompts), strict=True)):
            groups.setdefault(key, []).append(place)
        questions: list[Question] = []
        sides: list[tuple[int, int]] = []  # the first place of each answer
        first_of: dict[int, int] = {}
        for places in groups.values():
            distinct: dict[str, int] = {}
            for place in places:
                first_of[place] = distinct.setdefault(plain_text(completions[place]), place)
            user = user_ids[places[0]]
            person = self._people.get(user) or Person(user, about[places[0]])
            for (a, one), (b, other) in combinations(distinct.items(), 2):
                questions.append(Question(prompts[one], person, a, b))
                sides.append((one, other))
        sums, counts = torch.zeros(2, len(user_ids), dtype=torch.float64)
        for (one, other), result in zip(sides, judge_pair(self._judge, questions), strict=True):
            if not math.isnan(result.score):
                sums[one] += result.score
                sums[other] += 1 - result.score
                counts[one] += 1
                counts[other] += 1
        index = torch.tensor([first_of[place] for place in range(len(user_ids))], dtype=torch.long)
        scores: Tensor = sums[index] / counts[index]
        return scores
