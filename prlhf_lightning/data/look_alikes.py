"""Users' ids that look alike and may be one person's, and ids that stand for nobody."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,2})?")
_NOBODY = frozenset(
    (
        "null",
        "none",
        "nan",
        "na",
        "n/a",
        "#n/a",
        "<na>",
        "nil",
        "nat",
        "undefined",
        "missing",
        "-",
        "--",
        "?",
        "''",
        '""',
    )
)
_MOST = 300_000  # ids above which a description does not look for them


def look_alikes(user_ids: Iterable[str]) -> list[list[str]]:
    """Return groups of different ids that look alike, each group and the groups in order of appearance.

    Ids look alike that are the same but for case, spaces around or between words, invisible characters, composed
    (NFC) and decomposed (NFD) letters, full-width forms, or the spelling of a number (`7`, `7.0`, `07`, `7e0`).
    """
    groups: dict[str, list[str]] = {}
    for user_id in dict.fromkeys(user_ids):
        groups.setdefault(_key(user_id), []).append(user_id)
    return [group for group in groups.values() if len(group) > 1]


def stands_for_nobody(user_id: str) -> bool:
    """Return whether an id reads like a missing value, as `null` or `nan`."""
    return _visible(user_id).casefold() in _NOBODY or not _visible(user_id)


def has_hidden_characters(user_id: str) -> bool:
    """Return whether an id has spaces around it, or characters that cannot be seen."""
    return user_id != user_id.strip() or any(map(_is_hidden, user_id))


def from_pandas(user_ids: Iterable[str]) -> bool:
    """Return whether all ids are numbers that end in `.0`, as pandas writes whole numbers of a column with gaps."""
    ids = list(user_ids)
    return bool(ids) and all(re.fullmatch(r"\d+\.0", user_id) for user_id in ids)


def remark(user_ids: Iterable[str]) -> str | None:
    """Return what to tell of ids that look alike, in a few words, or None."""
    ids = list(dict.fromkeys(user_ids))
    if len(ids) > _MOST:
        return None
    groups = look_alikes(ids)
    told = []
    if groups:
        shown = ", ".join(" and ".join(map(repr, group[:3])) for group in groups[:3])
        told.append(f"{len(groups):,} groups of user ids that look alike, of one person each? ({shown})")
    if nobody := [user_id for user_id in ids if stands_for_nobody(user_id)]:
        told.append(f"user ids that read like a missing value: {', '.join(map(repr, nobody[:3]))}")
    if told:
        told[-1] += "; `data check` tells more"
    return "; ".join(told) or None


def _key(user_id: str) -> str:
    text = _visible(unicodedata.normalize("NFKC", user_id)).casefold()
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        return f"{number.normalize():f}" if number else "0"
    return unicodedata.normalize("NFKC", text)


def _visible(user_id: str) -> str:
    """Return an id without invisible characters, and with single spaces between its words."""
    if user_id.isascii() and user_id.isprintable():  # quick, for many
        return " ".join(user_id.split())
    return " ".join("".join(" " if char.isspace() else char for char in user_id if not _is_hidden(char)).split())


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cf", "Cc") and not char.isspace()
