"""What is asked of a writer, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prlhf_lightning.errors import ConfigurationError

Message: TypeAlias = dict[str, Any]
"""`{"role": ..., "content": ...}`, one turn of a conversation; it may hold tool calls."""
FinishReason: TypeAlias = Literal["stop", "length"]
"""`stop`: a token that ends answers or a stop string ended the text; `length`: `max_new_tokens`, or the
model's last position, did."""


# The same for the command line, Python and the server, whose requests are refused by the same bounds.
MOST_STRENGTH, MOST_TEMPERATURE, MOST_SHARE, MOST_SEED = 4.0, 2.0, 1000.0, 2**53 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """One thing to write.

    Attributes:
        prompt: A string, or a conversation for the tokenizer's chat template.
        user: A user's id, or a blend as `{id: share}`, whose shares count by their ratio: above 0, and 1000 at most.
            None and ids that the model does not know are the generic user.
        user_text: Text about the user, for user models that read it.
        strength: How far the user moves what is written: the logits are `generic + strength * (user - generic)`. 0 is
            the generic user (who keeps the user's text), 1 the model as trained, above 1 exaggerates; 4 at most.
        max_new_tokens: Tokens to write at most; fewer where the model has no more positions.
        temperature: Sampling temperature, 2 at most; 0 picks the likeliest token each time.
        top_p: Share of the probability to sample from.
        seed: What chance is drawn from; None draws differently each time. What is written under a seed does not depend
            on what else is being written.
        stop: Strings that end the text; they are not a part of it.
        tools: What the assistant may call, as JSON schemas for the chat template, or None.
        chat_template: Whether a prompt that is a string is wrapped in the chat template as one turn of the user; None
            for as in training. Conversations always are.
        continue_final_message: Go on with the last message, which is the assistant's, instead of answering it.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    prompt: str | list[Message]
    user: str | Mapping[str, float] | None = None
    user_text: str = ""
    strength: float = 1.0
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    tools: list[dict[str, Any]] | None = None
    chat_template: bool | None = None
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= MOST_STRENGTH:
            raise ConfigurationError(
                f"strength is {self.strength}; it must be 0 or more, and {MOST_STRENGTH:g} at most."
            )
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise ConfigurationError(
                f"temperature is {self.temperature}; it must be 0 (the likeliest token each time) or more, and "
                f"{MOST_TEMPERATURE:g} at most."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p is {self.top_p}; it must be above 0, and 1 at most.")
        if self.seed is not None and abs(self.seed) > MOST_SEED:
            raise ConfigurationError(f"seed is {self.seed}; it must be between -2**53 and 2**53.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigurationError(f"stop is {self.stop!r}; give a tuple of strings, none of them empty.")
        if isinstance(self.user, Mapping):
            self._check_blend(self.user)
        elif self.user is not None:
            _check_id(self.user)

    @staticmethod
    def _check_blend(blend: Mapping[str, float]) -> None:
        for user in blend:
            _check_id(user)
        bad = next((user for user, share in blend.items() if not 0 < share <= MOST_SHARE), None)
        if bad is not None:
            raise ConfigurationError(
                f"user: the share of {bad!r} is {blend[bad]}; it must be above 0, and {MOST_SHARE:g} at most."
            )
        if not blend:
            raise ConfigurationError("user: a blend is empty; name users and their shares, as in {'ann': 2, 'bob': 1}.")


def _check_id(user: object) -> None:
    if not isinstance(user, str):
        raise ConfigurationError(f"user: {user!r} is of type {type(user).__name__}; ids are strings: {str(user)!r}.")
    if not user.strip():
        raise ConfigurationError("user: an id is empty; give None for the generic user.")


@dataclass(frozen=True)
class Chunk:
    """What one step brought of one generation.

    Attributes:
        number: The generation's, as `Engine.add` returned it.
        text: Text to append; empty while a character or a possible stop string is incomplete.
        tokens: Tokens that the step wrote.
        finish_reason: None while more is to come; what a piece with a reason brings is the last.
        ids: The tokens written, EOS included.
        prompt_tokens: Tokens that stand before the completion: BOS, the user's text, the prompt.
        known_user: Whether the model knows every user who was named; false where none was.
    """

    number: int
    text: str
    tokens: int
    finish_reason: FinishReason | None
    ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    known_user: bool = False


@dataclass(frozen=True)
class Completion:
    """One thing written.

    Attributes:
        text: The text, without special tokens and without the stop string that ended it.
        ids: Its tokens, with the one that ended it where there was one.
        finish_reason: Why it ended.
        prompt_tokens: Tokens before it: BOS, the user's text, the prompt.
        completion_tokens: Number of `ids`.
        known_user: Whether the model knows every user who was named; false where none was.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    known_user: bool
