"""Rows that name a winner of two responses, as Chatbot Arena's do, as rows of a chosen and a rejected one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prlhf_lightning.data.conversations import fail

_FIRST = {"a", "model_a", "response_a", "answer_a", "assistant_a", "first", "left", "response_1", "response1", "1"}
_SECOND = {"b", "model_b", "response_b", "answer_b", "assistant_b", "second", "right", "response_2", "response2", "2"}
_NEITHER = {"tie", "tie (bothbad)", "both", "both_bad", "bothbad", "neither", "draw", "equal", "same"}


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


def only_turn(value: Any) -> Any:
    """Return the one text of a list, written as JSON, of one text, as in Kaggle's LMSYS data; else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        try:
            texts = json.loads(value)
        except ValueError:
            return value
        if isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], str):
            return texts[0]
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return value
