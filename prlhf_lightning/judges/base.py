"""SUBCLASS HERE: a judge of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.records import Text

Verdict: TypeAlias = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Vote:
    """A judgement that a user is known to have made."""

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

    minds_order: ClassVar[bool] = True
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
