"""Scores of answers from a judge of two."""

from __future__ import annotations

import math

from prlhf_lightning.analysis.judges import Judge
from prlhf_lightning.analysis.judges.ranking import JudgeScorer
from prlhf_lightning.errors import JudgeError


class LikesLength(Judge):
    """Prefers longer answers, and has no verdict about some."""

    position_sensitive = False

    def __init__(self) -> None:
        self.questions = 0

    def judge(self, prompt, user, a, b):
        self.questions += 1
        if "?" in a + b:
            raise JudgeError("no verdict")
        return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"


def test_a_score_is_the_share_of_beaten_answers():
    judge = LikesLength()
    answers = ["aaa", "b", "cc", "dd", "cc", "?"]
    scores = JudgeScorer(judge).score(["ann"] * 6, ["p"] * 6, answers).tolist()
    assert scores[:5] == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert math.isnan(scores[5])
    assert judge.questions == 5 * 4 / 2  # equal answers are one


def test_other_prompts_and_users_are_not_compared():
    users, prompts = ["ann", "bob", "ann", "ann"], ["p", "p", "q", "p"]
    scores = JudgeScorer(LikesLength()).score(users, prompts, ["a", "bb", "ccc", "dddd"]).tolist()
    assert scores[0::3] == [0.0, 1.0]
    assert all(map(math.isnan, scores[1:3]))
