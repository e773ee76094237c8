r"""Prompts that stand inside plain-text answers, as in Anthropic's transcripts or TRL's rows without a `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_TURN = "\n\nAssistant:"
_USER_TURN = "\n\nHuman:"
_LEAST_SHARED = 2  # words; answers that only begin alike share less
_LEAST_REPEATED = 16


class Note(NamedTuple):
    """Something about a row that is told, with the number of such rows, and stops no run.

    Attributes:
        field: The field.
        problem: What is so.
        fix: What to do about it.
    """

    field: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"field {self.field!r} {self.problem}; {self.fix}"


TRANSCRIPT = Note(
    "prompt",
    "is missing and was taken from the transcripts, up to the last 'Assistant:' that they share, as plain text",
    "nothing to do if that is meant; HHRLHFSource with conversations: true makes messages of it for a chat model",
)
MORE_TURNS = Note(
    "chosen",
    "goes on with another turn of 'Human:' (or 'rejected' does)",
    "drop such rows, or a model learns to write as the user",
)
SHARED_START = Note(
    "prompt",
    "is missing and was taken to be the text with which both answers begin, as TRL does",
    "nothing to do if that is meant; else write the prompt to a column of its own",
)
REPEATED = Note(
    "prompt",
    "stands again at the start of the answers, and was left out of them",
    "nothing to do if that is meant; else remove the prompt column",
)

ONE_REPEATS = Note(
    "prompt",
    "stands again at the start of one of the two answers, and was kept there",
    "remove it there, or the model learns from a difference that is not the user's taste",
)


def implicit_prompt(chosen: str, rejected: str | None) -> tuple[str, list[Note]] | None:
    """Return the prompt with which answers begin, and what to tell about it; None where there seems to be none.

    Args:
        chosen: The preferred answer, with its prompt.
        rejected: The other, if there is one.
    """
    shared = chosen if rejected is None else _shared_start(chosen, rejected)
    end = shared.rfind(_TURN)
    if end >= 0 and shared.lstrip().startswith("Human:"):
        end += len(_TURN)
        notes = [TRANSCRIPT]
        if _USER_TURN in chosen[end:] or _USER_TURN in (rejected or "")[end:]:
            notes.append(MORE_TURNS)
        return shared[:end], notes
    if rejected is None:
        return None
    prompt = _whole_words(shared, chosen, rejected)
    if len(prompt.split()) < _LEAST_SHARED or not chosen[len(prompt) :].strip() or not rejected[len(prompt) :].strip():
        return None
    return prompt, [SHARED_START]


def without_prompt(prompt: str, answers: Mapping[str, str]) -> tuple[dict[str, str], list[Note]]:
    """Return answers without their prompt where all begin with it, and what to tell.

    White space around the prompt does not count. Where only one of two answers begins with it, they stay as they are. A
    prompt that is too short is not looked for: it could stand there by chance.

    Args:
        prompt: What was asked.
        answers: The field of each answer, and its text.
    """
    asked = prompt.strip()
    if len(asked) < _LEAST_REPEATED or len(asked.split()) < _LEAST_SHARED:
        return dict(answers), []
    repeating = [field for field, answer in answers.items() if answer.lstrip().startswith(asked)]
    if not repeating:
        return dict(answers), []
    if len(repeating) < len(answers):
        return dict(answers), [ONE_REPEATS]
    return {field: _after(prompt, answer) for field, answer in answers.items()}, [REPEATED]


def _after(prompt: str, answer: str) -> str:
    """Return an answer after the prompt that it begins with; what parts them stands in one of the two only."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    rest = answer.lstrip()[len(prompt.strip()) :]
    return rest.lstrip() if prompt[-1:].isspace() else rest


def _shared_start(first: str, second: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:end]


def _whole_words(shared: str, chosen: str, rejected: str) -> str:
    """Return a shared start without the beginning of a word in which the texts part, and without a last space."""
    following = chosen[len(shared) : len(shared) + 1] + rejected[len(shared) : len(shared) + 1]
    if shared[-1:].isalnum() and any(map(str.isalnum, following)):
        while shared and not shared[-1].isspace():
            shared = shared[:-1]
    return shared.removesuffix(" ")
