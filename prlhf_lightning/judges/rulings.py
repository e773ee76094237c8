"""Verdicts that do not depend on which answer came first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prlhf_lightning.errors import JudgeError
from prlhf_lightning.judges.base import Judge, Question, Verdict

_SWAPPED: dict[Verdict, Verdict] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class Ruling:
    """What became of one question.

    Attributes:
        verdict: None where the judge failed.
        agrees: Whether both orders led to the same verdict; where not, it is a tie.
        error: Why the judge failed.
    """

    verdict: Verdict | None
    agrees: bool = True
    error: str = ""

    @property
    def score(self) -> float:
        """1 where `a` won, 0.5 for a tie, 0 where `b` did."""
        return {"a": 1.0, "tie": 0.5, "b": 0.0, None: float("nan")}[self.verdict]


def rule(judge: Judge, questions: Sequence[Question], on_ruling: Callable[[], object] = lambda: None) -> list[Ruling]:
    """Put each question to a judge, in both orders where order may matter.

    Disagreement between the orders is a tie, as are two equal answers, about which nobody is asked.

    Args:
        judge: Whom to ask.
        questions: What to ask.
        on_ruling: Called after each.

    Returns:
        A ruling for each question, in their order.
    """

    def ruling(question: Question) -> Ruling:
        found = _ruling(judge, question)
        on_ruling()
        return found

    if judge.workers <= 1:
        return [ruling(question) for question in questions]
    with ThreadPoolExecutor(judge.workers) as pool:
        try:
            return list(pool.map(ruling, questions))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what would fail all the same is not to be waited for
            raise


def _ruling(judge: Judge, question: Question) -> Ruling:
    if question.a == question.b:
        return Ruling("tie")
    try:
        first = judge.judge(question.prompt, question.user, question.a, question.b)
        if not judge.minds_order:
            return Ruling(first)
        other = question.swapped()
        second = _SWAPPED[judge.judge(other.prompt, other.user, other.a, other.b)]
    except JudgeError as error:
        return Ruling(None, error=str(error))
    return Ruling(first) if first == second else Ruling("tie", agrees=False)
