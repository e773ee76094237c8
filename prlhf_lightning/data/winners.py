"""Rows that name a winner of two responses, as Chatbot Arena's do, as rows of a chosen and a rejected one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prlhf_lightning.data.conversations import fail

_FIRST = {"a", "model_a", "response_a", "answer_a", "assistant_a", "first", "left", "response_1", "response1", "1"}
_SECOND = {"b", "model_b", "response_b", "answer_b", "assistant_b", "second", "right", "response_2", "response2", "2"}
_NEITHER = {"tie", "tie (bothbad)", "both", "both_bad", "bothbad", "neither", "draw", "equal", "same"}
_LIST = re.compile(r'\s*\[\s*(?:"|null\b|\])')


def winner_is_named(row: Mapping[str, Any], winner: str) -> bool:
    """Return whether a row has a column, or three, that name a winner."""
    return winner in row or all(flag in row for flag in _flags(winner))


def winner_of(row: Mapping[str, Any], where: str, winner: str, names: tuple[str, str]) -> tuple[int | None, str] | None:
    """Return which of two responses won (0, 1 or None for a tie) and the column that says so; None if none does.

    Args:
        row: The row.
        where: Where it stands.
        winner: The column that names the winner. Where there is none, `<winner>_model_a`, `<winner>_model_b` and
            `<winner>_tie` with 1 in one of them will do, as in Kaggle's LMSYS data.
        names: The columns of the two responses, whose names may name the winner as well.

    Raises:
        FeedbackFormatError: The winner is neither of them and no tie.
    """
    if winner not in row:
        flags = _flags(winner)
        if not all(flag in row for flag in flags):
            return None
        won = [flag for flag in flags if str(row[flag]).strip().lower() in ("1", "1.0", "true")]
        if len(won) != 1:
            fail(where, "winner", f"is not told by the columns {', '.join(map(repr, flags))}; one of them must be 1")
        return (0, 1, None)[flags.index(won[0])], won[0]
    if row[winner] is None:
        fail(where, "winner", f"is null (column {winner!r}); fill it or drop the row")
    value = str(row[winner]).strip()
    for first, second in (names, (str(row.get("model_a")), str(row.get("model_b")))):
        if value in (first, second) and first != second:
            return int(value == second), winner
    name = value.lower().replace("-", "_")
    for place, known in ((0, _FIRST), (1, _SECOND), (None, _NEITHER)):
        if name in known or name.replace(" ", "_") in known:
            return place, winner
    shown = value if len(value) <= 40 else value[:40] + "..."
    fail(
        where,
        "winner",
        f"is {shown!r}; write a, b or tie (also model_a and model_b, 1 and 2, or the name of the response's column)",
    )


def _flags(winner: str) -> list[str]:
    return [f"{winner}_{name}" for name in ("model_a", "model_b", "tie")]


def only_turns(
    prompt: Any, responses: Sequence[Any], where: str, names: tuple[str, str] = ("response_a", "response_b")
) -> tuple[Any, list[Any]]:
    """Return a prompt and its responses, where each is a list (maybe written as JSON) of one text, as that text.

    Kaggle's LMSYS data are such lists, with a text for each turn. All else is returned as it is.

    Args:
        prompt: The prompt, or None where there is none.
        responses: The two responses.
        where: Where the row stands.
        names: The fields of the responses, for messages.

    Raises:
        FeedbackFormatError: There are several turns, of which the two models saw different ones, or none.
    """
    if (turns := _turns(prompt)) is not None:
        named = dict(zip(("prompt", *names), (turns, *map(_turns, responses)), strict=True))
    else:  # responses alone may be lists because a list was asked for
        named = {name: _turns(response) for name, response in zip(names, responses, strict=True)}
        named = {name: found if _is_one(found) else None for name, found in named.items()}
    for name, found in named.items():
        if found is not None and len(found) > 1:
            fail(
                where,
                name,
                f"is a list of {len(found)} turns, and the two models, whose earlier answers differ, share no prompt "
                "but the first; keep the first turn and its two answers as texts, or drop the row",
            )
        if found is not None and not _is_one(found):
            fail(where, name, "is a list without a text (null, or nothing, stands there); drop the row")
    texts = [found[0] if (found := named[name]) else given for name, given in zip(names, responses, strict=True)]
    return (prompt if turns is None else turns[0]), texts


def _is_one(turns: list[str | None] | None) -> bool:
    return turns is not None and len(turns) == 1 and turns[0] is not None


def _turns(value: Any) -> list[str | None] | None:
    """Return a list of texts, of which some may be null, that is given as such or written as JSON; None for others."""
    if isinstance(value, str) and _LIST.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not all(text is None or isinstance(text, str) for text in value):
        return None
    return value
