"""What to say where columns are missing: which of those that are there may hold the fields."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

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


def near(field: str, column: str, columns: Sequence[object]) -> str | None:
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


def advice(field: str, column: str, columns: Sequence[object]) -> str:
    """Return how to name the column of one field."""
    close = near(field, column, columns)
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
        if close := near(field, column, left):
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
