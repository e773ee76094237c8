"""SUBCLASS HERE: a judge of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.records import Text
from prlhf_lightning.errors import JudgeError

Verdict: TypeAlias = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Vote:
    """A known judgment of a user."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Person:
    """The user for whom a judge decides.

    Attributes:
        user_id: The user's id in batches and checkpoints.
        text: Text about the user, such as stated preferences; may be empty.
        votes: Some of the user's votes.
    """

    user_id: str
    text: str = ""
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question: which of two answers to a prompt would the user prefer?"""

    prompt: Text
    user: Person
    a: str
    b: str

    def swapped(self) -> Question:
        """Return the same question with the answers in the other order."""
        return replace(self, a=self.b, b=self.a)


class Judge(ABC):
    """Says which of two answers a user would prefer.

    Attributes:
        minds_order: Whether which answer comes first may matter; such a judge is asked in both orders. Not so where
            each answer is scored by itself.
        workers: Number of concurrent questions.
        caveat: A note for readers of its verdicts.
    """

    position_sensitive: ClassVar[bool] = True
    workers: int = 1
    caveat: str = ""

    @property
    def name(self) -> str:
        """The judge's name next to its verdicts."""
        return type(self).__name__

    def prepare(self, data: PreferenceDataModule) -> None:  # noqa: B027 - most judges need nothing
        """Prepare for questions about users and prompts of the data; called once before `judge`.

        Raises:
            ConfigurationError: This judge cannot judge these users.
        """

    @abstractmethod
    def judge(self, prompt: Text, user: Person, a: str, b: str) -> Verdict:
        """Return which of two answers the user would prefer.

        Raises:
            JudgeError: There is no verdict for this question; it counts as an error, never as a tie.
            ConfigurationError: There will be no verdict for any question.
        """


_SWAPPED: dict[Verdict, Verdict] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class PairResult:
    """The result of one question.

    Attributes:
        verdict: The verdict; None if the judge failed.
        agrees: Whether both orders gave the same verdict; if not, it is a tie.
        error: Reason of the failure.
    """

    verdict: Verdict | None
    agrees: bool = True
    error: str = ""

    @property
    def score(self) -> float:
        """1 if `a` won, 0.5 for a tie, 0 if `b` won."""
        return {"a": 1.0, "tie": 0.5, "b": 0.0, None: float("nan")}[self.verdict]


def judge_pair(
    judge: Judge, questions: Sequence[Question], on_ruling: Callable[[], object] = lambda: None
) -> list[PairResult]:
    """Return a judge's result for each question, asked in both orders if order may matter.

    Disagreement between the orders is a tie. Two equal answers are a tie without asking the judge.

    Args:
        judge: The judge.
        questions: The questions.
        on_ruling: Called after each.

    Returns:
        A result for each question, in order.
    """

    def ruling(question: Question) -> PairResult:
        found = _ruling(judge, question)
        on_ruling()
        return found

    if judge.workers <= 1:
        return [ruling(question) for question in questions]
    with ThreadPoolExecutor(judge.workers) as pool:
        try:
            return list(pool.map(ruling, questions))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # do not wait for questions that would fail too
            raise


def _ruling(judge: Judge, question: Question) -> PairResult:
    if question.a == question.b:
        return PairResult("tie")
    try:
        first = judge.judge(question.prompt, question.user, question.a, question.b)
        if not judge.position_sensitive:
            return PairResult(first)
        other = question.swapped()
        second = _SWAPPED[judge.judge(other.prompt, other.user, other.a, other.b)]
    except JudgeError as error:
        return PairResult(None, error=str(error))
    return PairResult(first) if first == second else PairResult("tie", agrees=False)
