"""Fields of rows that have another shape than ours, each checked as it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from prlhf_lightning.data.conversations import check_characters, fail
from prlhf_lightning.errors import FeedbackFormatError

_T = TypeVar("_T")
_KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Schema:
    """Reads fields by their path, and says what is wrong where they are not as expected.

    Messages name place and field, and never quote a value: it may be about a person.

    Attributes:
        name: What the rows are, as in "a row of the original comparisons".
        fix: What to do where one is not.
    """

    name: str
    fix: str = "read the original file, or data of your own with FileSource"

    def get(self, row: Any, where: str, *path: str | int, kind: type[_T]) -> _T:
        """Return the value at a path such as `("summaries", 0, "text")`.

        Args:
            row: The row, or a part of it.
            where: Where it stands; every message starts with it.
            path: Keys of objects and places in lists, from the row down.
            kind: `str`, `int`, `bool`, `list` or `dict`.

        Raises:
            FeedbackFormatError: It is missing or of another kind.
        """
        value = self._follow(row, where, path)
        right = isinstance(value, Mapping if kind is dict else kind) and not (kind is int and isinstance(value, bool))
        if not right:
            self.fail(where, path, f"is {_found(value)} where {self.name} has {_KINDS[kind]}")
        if isinstance(value, str):
            check_characters(value, where, _shown(path))
        return value  # type: ignore[no-any-return]

    def number(self, row: Any, where: str, *path: str | int) -> float:
        """Return the finite number at a path; CSV files hold numbers as strings."""
        value = self._follow(row, where, path)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.fail(where, path, f"is a string that is no number where {self.name} has a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(where, path, f"is {_found(value)} where {self.name} has a number")
        if not math.isfinite(value):
            self.fail(where, path, f"is {value}, which is no judgment")
        return float(value)

    def fail(self, where: str, path: tuple[str | int, ...], problem: str) -> NoReturn:
        """Raise the error that says what is wrong with a field."""
        raise FeedbackFormatError(f"{where}: field {_shown(path)!r} {problem}; {self.fix}.")

    def _follow(self, row: Any, where: str, path: tuple[str | int, ...]) -> Any:
        value = row
        for depth, key in enumerate(path, start=1):
            here = isinstance(value, list) if isinstance(key, int) else isinstance(value, Mapping)
            if not here:
                kind = _KINDS[list if isinstance(key, int) else dict]
                self.fail(where, path[: depth - 1] or path, f"is {_found(value)} where {self.name} has {kind}")
            if (key >= len(value)) if isinstance(key, int) else (key not in value):
                self.fail(where, path[:depth], f"is missing from {self.name}")
            value = value[key]
        return value


def _shown(path: tuple[str | int, ...]) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return "".join(parts).removeprefix(".")


def _found(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


#: Other names, in public data, of the columns that hold a field.
_NAMED = 20  # columns that are named
_SYNONYMS = {
    "user_id": "user userid uid worker workerid annotator annotatorid rater raterid judge judgeid labeler labelerid "
    "person personid participant participantid account accountid customer customerid username evaluator evaluatorid",
    "prompt": "question instruction query input context conversations conversation messages history post request",
    "chosen": "preferred better accepted best winning chosenresponse responsechosen preferredresponse completion "
    "messages conversations output response answer positive",
    "rejected": "dispreferred worse rejectedresponse responserejected worst losing other negative",
    "completion": "response answer output reply generation message messages conversations text content",
    "label": "rating thumb thumbs feedback vote score liked reaction stars isgood helpful",
    "user_text": "profile persona bio about userprofile description",
    "response_a": "responsea response1 answera answer1 conversationa completiona outputa output1 textone left",
    "response_b": "responseb response2 answerb answer2 conversationb completionb outputb output2 right",
    "winner": "preference preferred vote choice verdict label better best overallpreference chosen",
    "rating": "score stars grade value points label",
    "completions": "responses answers outputs candidates ranking",
    "system": "systemprompt systemmessage instruction",
}


def similar_columns(field: str, column: str, columns: Sequence[object]) -> str | None:
    """Return the column that may be meant for a field, or None.

    Args:
        field: The field.
        column: The column that should hold it, and is not there.
        columns: Those that are.
    """
    names = [str(name) for name in columns]
    plain = {_plain(name): name for name in reversed(names)}
    for meant in (column, field, *_SYNONYMS.get(field, "").split()):
        if _plain(meant) in plain:
            return plain[_plain(meant)]
        if meant in (column, field) and (close := get_close_matches(meant, names, n=1)):
            return close[0]
    words = set(_SYNONYMS.get(field, "").split()) | {field}
    return next((name for name in names if words.intersection(re.split(r"[^0-9a-z]+", name.lower()))), None)


def column_advice(field: str, column: str, columns: Sequence[object]) -> str:
    """Return how to name the column of one field."""
    close = similar_columns(field, column, columns)
    if close is None:
        return f"name the column that holds it with columns: {{{field}: <its name>}}"
    return f"if {close!r} holds it, rename that column or set columns: {{{field}: {_in_yaml(close)}}}"


def all_missing(where: str, missing: Mapping[str, str], columns: Sequence[object]) -> str:
    """Return the message about several missing columns.

    Args:
        where: Where the row stands.
        missing: Each field, and the column that should hold it.
        columns: The columns that are there.
    """
    found: dict[str, str] = {}
    for field, column in missing.items():
        left = [name for name in columns if name not in found.values()]
        if close := similar_columns(field, column, left):
            found[field] = close
    named = [f"{field!r}" + (f" (column {column!r})" if column != field else "") for field, column in missing.items()]
    mapping = ", ".join(f"{field}: {_in_yaml(found[field]) if field in found else '<its name>'}" for field in missing)
    there = ", ".join(repr(str(name)) for name in columns)
    return (
        f"{where}: fields {', '.join(named[:-1])} and {named[-1]} are missing: there are the columns {there}; "
        f"name those that hold them, as in columns: {{{mapping}}}."
    )


def _in_yaml(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d][\w.-]*( [\w.-]+)*", name) else repr(name)


class UnreadColumns:
    """Columns of rows that no field is read from.

    Args:
        known: Columns that fields are read from.

    Attributes:
        names: The first few others, in order of appearance.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._seen = set(known)
        self.names: list[str] = []

    def add(self, row: Mapping[str, object]) -> None:
        """Note the columns of a row."""
        if len(self.names) < _NAMED and not self._seen.issuperset(row):
            new = [str(name) for name in row if name not in self._seen]
            self._seen.update(row)
            self.names += new[: _NAMED - len(self.names)]


def _plain(name: str) -> str:
    return re.sub(r"[^0-9a-z]", "", name.lower())


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
