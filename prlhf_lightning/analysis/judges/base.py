"""SUBCLASS HERE: a judge of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.schema import Text
from prlhf_lightning.errors import JudgeError

Verdict: TypeAlias = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Vote:
    """A judgment that a user is known to have made."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Person:
    """The user in whose place is judged.

    Attributes:
        user_id: By which batches and checkpoints know the user.
        text: What is known about the user, or what they asked for; empty where nothing is.
        votes: Some of what the user preferred to what.
    """

    user_id: str
    text: str = ""
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True)
class Question:
    """Which of two answers to a prompt would the user like better?"""

    prompt: Text
    user: Person
    a: str
    b: str

    def swapped(self) -> Question:
        """Return the same question with the answers in the other order."""
        return replace(self, a=self.b, b=self.a)


class Judge(ABC):
    """Says which of two answers a user would like better.

    Attributes:
        minds_order: Whether which answer comes first may matter; such a judge is asked in both orders. Not so where
            each answer is scored by itself.
        workers: How many questions may be asked at once.
        caveat: What a reader of its verdicts should know.
    """

    position_sensitive: ClassVar[bool] = True
    workers: int = 1
    caveat: str = ""

    @property
    def name(self) -> str:
        """What the judge is called where its verdicts are shown."""
        return type(self).__name__

    def prepare(self, data: PreferenceDataModule) -> None:  # noqa: B027 - most judges need nothing
        """Take what is needed of the data whose users and prompts will be asked about; called once before `judge`.

        Raises:
            ConfigurationError: This judge cannot judge these users.
        """

    @abstractmethod
    def judge(self, prompt: Text, user: Person, a: str, b: str) -> Verdict:
        """Return which of two answers the user would like better.

        Raises:
            JudgeError: This question got no verdict; it is counted as an error, and never as a tie.
            ConfigurationError: No question will get any.
        """


_SWAPPED: dict[Verdict, Verdict] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class PairResult:
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


def judge_pair(
    judge: Judge, questions: Sequence[Question], on_ruling: Callable[[], object] = lambda: None
) -> list[PairResult]:
    """Put each question to a judge, in both orders where order may matter.

    Disagreement between the orders is a tie, as are two equal answers, about which nobody is asked.

    Args:
        judge: Whom to ask.
        questions: What to ask.
        on_ruling: Called after each.

    Returns:
        A ruling for each question, in their order.
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
            pool.shutdown(wait=False, cancel_futures=True)  # what would fail all the same is not to be waited for
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
