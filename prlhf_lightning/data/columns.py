"""Checked access to fields of raw rows, and advice on missing or differently named columns."""

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
    """Reads fields by path, and raises clear errors for malformed fields.

    Messages name location and field, and never quote a value: it may be personal data.

    Attributes:
        name: Kind of the rows, as in "a row of the original comparisons".
        fix: The fix for a malformed row.
    """

    name: str
    fix: str = "read the original file, or data of your own with FileSource"

    def get(self, row: Any, where: str, *path: str | int, kind: type[_T]) -> _T:
        """Return the value at a path such as `("summaries", 0, "text")`.

        Args:
            row: The row, or a part of it.
            where: Location of the row; every message starts with it.
            path: Keys of objects and indices of lists, from the row down.
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
        """Return the finite number at a path; it may be a string, as in CSV files."""
        value = self._follow(row, where, path)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.fail(where, path, f"is a string that is no number where {self.name} has a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(where, path, f"is {_found(value)} where {self.name} has a number")
        if not math.isfinite(value):
            self.fail(where, path, f"is {value}, which is no judgment", "is no finite number")
        return float(value)

    def fail(self, where: str, path: tuple[str | int, ...], problem: str, kind: str | None = None) -> NoReturn:
        """Raise an error about a field; `kind` is the problem without the row's values."""
        raise FeedbackFormatError(problem, self.fix, field=_shown(path), where=where, kind=kind)

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


#: Column names of each field in public data sets.
_NAMED = 20  # columns named in a message
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
    """Return the column that is probably meant for a field, or None.

    Args:
        field: The field.
        column: Its expected column, which is missing.
        columns: The existing columns.
    """
    names = [str(name) for name in columns]
    plain = {_plain(name): name for name in reversed(names)}
    for meant in (column, field, *_SYNONYMS.get(field, "").split()):
        if _plain(meant) in plain:
            return plain[_plain(meant)]
    for meant in (column, field):  # a misspelled name
        if close := get_close_matches(meant, names, n=1, cutoff=0.75):
            return close[0]
    words = set(_SYNONYMS.get(field, "").split()) | {field}
    return next((name for name in names if words.intersection(re.split(r"[^0-9a-z]+", name.lower()))), None)


def column_advice(field: str, column: str, columns: Sequence[object]) -> str:
    """Return advice on naming the column of a field."""
    close = similar_columns(field, column, columns)
    if close is None:
        return f"name the column that holds it with columns: {{{field}: <its name>}}"
    return f"if {close!r} holds it, rename that column or set columns: {{{field}: {_in_yaml(close)}}}"


def all_missing(where: str, missing: Mapping[str, str], columns: Sequence[object]) -> FeedbackFormatError:
    """Return the error about several missing columns.

    Args:
        where: Location of the row.
        missing: Each field and its expected column.
        columns: The existing columns.
    """
    found: dict[str, str] = {}
    for field, column in missing.items():
        left = [name for name in columns if name not in found.values()]
        if close := similar_columns(field, column, left):
            found[field] = close
    named = [f"{field!r}" + (f" (column {column!r})" if column != field else "") for field, column in missing.items()]
    mapping = ", ".join(f"{field}: {_in_yaml(found[field]) if field in found else '<its name>'}" for field in missing)
    there = ", ".join(repr(str(name)) for name in columns)
    return FeedbackFormatError(
        f"fields {', '.join(named[:-1])} and {named[-1]} are missing: there are the columns {there}",
        f"name those that hold them, as in columns: {{{mapping}}}",
        where=where,
        kind=f"fields {', '.join(missing)} are missing",
    )


def _in_yaml(name: str) -> str:
    return name if re.fullmatch(r"[^\W\d][\w.-]*( [\w.-]+)*", name) else repr(name)


class UnreadColumns:
    """Collects columns of rows that are not used.

    Args:
        known: Columns that are used.

    Attributes:
        names: The first few unused columns, in order of appearance.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._seen = set(known)
        self.names: list[str] = []

    def add(self, row: Mapping[str, object]) -> None:
        """Add the columns of a row."""
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
    """Return whether a row has a winner column, or the three columns of Kaggle's format."""
    return winner in row or all(flag in row for flag in _flags(winner))


def winner_of(row: Mapping[str, Any], where: str, winner: str, names: tuple[str, str]) -> tuple[int | None, str] | None:
    """Return the winning response (0, 1 or None for a tie) and its column; None if no column names a winner.

    Args:
        row: The row.
        where: Location of the row.
        winner: The column of the winner. Without it, the columns `<winner>_model_a`, `<winner>_model_b` and
            `<winner>_tie` are used, one of which is 1, as in Kaggle's LMSYS data.
        names: The columns of the two responses; the winner may also be given by these names.

    Raises:
        FeedbackFormatError: The winner is neither a response nor a tie.
    """
    if winner not in row:
        flags = _flags(winner)
        if not all(flag in row for flag in flags):
            return None
        won = [flag for flag in flags if str(row[flag]).strip().lower() in ("1", "1.0", "true")]
        if len(won) != 1:
            problem = f"is not told by the columns {', '.join(map(repr, flags))}"
            fail(where, "winner", problem, "one of them must be 1", "is not told by the columns of winners")
        return (0, 1, None)[flags.index(won[0])], won[0]
    if row[winner] is None:
        fail(where, "winner", f"is null (column {winner!r})", "fill it or drop the row", "is null")
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
        f"is {shown!r}",
        "write a, b or tie (also model_a and model_b, 1 and 2, or the name of the response's column)",
        "names neither response and no tie",
    )


def _flags(winner: str) -> list[str]:
    return [f"{winner}_{name}" for name in ("model_a", "model_b", "tie")]


def only_turns(
    prompt: Any, responses: Sequence[Any], where: str, names: tuple[str, str] = ("response_a", "response_b")
) -> tuple[Any, list[Any]]:
    """Unwrap a prompt and its responses if each is a list of one text (or its JSON).

    Kaggle's LMSYS data are such lists, with one text per turn. Other values are returned unchanged.

    Args:
        prompt: The prompt, or None.
        responses: The two responses.
        where: Location of the row.
        names: The fields of the responses, for messages.

    Raises:
        FeedbackFormatError: There are several turns, in which the two models saw different messages, or none.
    """
    if (turns := _turns(prompt)) is not None:
        named = dict(zip(("prompt", *names), (turns, *map(_turns, responses)), strict=True))
    else:  # responses without a prompt list may be lists because the prompt asked for one
        named = {name: _turns(response) for name, response in zip(names, responses, strict=True)}
        named = {name: found if _is_one(found) else None for name, found in named.items()}
    for name, found in named.items():
        if found is not None and len(found) > 1:
            fail(
                where,
                name,
                f"is a list of {len(found)} turns, and the two models, whose earlier answers differ, share no prompt "
                "but the first",
                "keep the first turn and its two answers as texts, or drop the row",
                "is a list of several turns",
            )
        if found is not None and not _is_one(found):
            fail(where, name, "is a list without a text (null, or nothing, stands there)", "drop the row")
    texts = [found[0] if (found := named[name]) else given for name, given in zip(names, responses, strict=True)]
    return (prompt if turns is None else turns[0]), texts


def _is_one(turns: list[str | None] | None) -> bool:
    return turns is not None and len(turns) == 1 and turns[0] is not None


def _turns(value: Any) -> list[str | None] | None:
    """Return a list of texts or nulls, given as a list or as JSON; None for other values."""
    if isinstance(value, str) and _LIST.match(value):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not all(text is None or isinstance(text, str) for text in value):
        return None
    return value
