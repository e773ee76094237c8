"""Generation requests, and their chunks and completions."""

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


# The same limits for the command line, Python and the server.
MOST_STRENGTH, MOST_TEMPERATURE, MOST_SHARE, MOST_SEED = 4.0, 2.0, 1000.0, 2**53 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """A request to generate one text.

    Attributes:
        prompt: A string, or a conversation for the tokenizer's chat template.
        user: A user's id, or a blend as `{id: share}`, whose shares count by their ratio: above 0, and 1000 at most.
            None and ids that the model does not know are the generic user.
        user_text: Text about the user, for user models that read it.
        strength: How strongly the user changes the text: the logits are `generic + strength * (user - generic)`. 0 is
                    the generic user (with the user's text), 1 the model as trained, above 1 exaggerates; at most 4.
        max_new_tokens: Maximum number of new tokens; fewer if the model has no more positions.
        temperature: Sampling temperature, at most 2; 0 is greedy.
        top_p: Probability mass to sample from.
        seed: Random seed; None for a new one each time. A text with a seed does not depend on other requests.
        stop: Strings that end the text; they are not part of it.
        tools: Tools of the assistant, as JSON schemas for the chat template, or None.
        chat_template: Whether a string prompt is one user turn in the chat template; None for as in training.
            Conversations always use the template.
        continue_final_message: Continue the last message, which must be the assistant's.

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
                f"temperature is {self.temperature}; it must be 0 (greedy) or more, and {MOST_TEMPERATURE:g} at most."
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
            fix = f"it must be above 0, and {MOST_SHARE:g} at most"
            raise ConfigurationError(f"the share of {bad!r} is {blend[bad]}", fix, field="user")
        if not blend:
            fix = "name users and their shares, as in {'ann': 2, 'bob': 1}"
            raise ConfigurationError("a blend is empty", fix, field="user")


def _check_id(user: object) -> None:
    if not isinstance(user, str):
        fix = f"ids are strings: {str(user)!r}"
        raise ConfigurationError(f"{user!r} is of type {type(user).__name__}", fix, field="user")
    if not user.strip():
        raise ConfigurationError("an id is empty", "give None for the generic user", field="user")


@dataclass(frozen=True)
class Chunk:
    """The result of one step for one request.

    Attributes:
        number: Number of the request, as returned by `Engine.add`.
        text: Text to append; empty while a character or a possible stop string is incomplete.
        tokens: Number of new tokens.
        finish_reason: None until the last chunk.
        ids: The new tokens, including EOS.
        prompt_tokens: Number of tokens before the completion: BOS, the user's text, the prompt.
        known_user: Whether the model knows every named user; False without a user.
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
    """A generated text.

    Attributes:
        text: The text, without special tokens and without the stop string that ended it.
        ids: Its tokens, including the end token, if any.
        finish_reason: Reason of its end.
        prompt_tokens: Number of tokens before it: BOS, the user's text, the prompt.
        completion_tokens: Number of `ids`.
        known_user: Whether the model knows every named user; False without a user.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    known_user: bool
