"""User vocabulary: user ids and their rows in the user table, and checks of suspicious ids."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError


class UserVocabulary:
    """Maps user ids (any strings) to rows of the user table.

    Row 0 is the generic user `u_0` of arXiv:2402.05133; the first id has row 1. Unknown ids fall back to the generic
    user. A checkpoint only needs `list(vocabulary.ids)`: `UserVocabulary(ids)` restores the vocabulary.

    Args:
        ids: The known users, in the order of their rows.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids: tuple[str, ...] = tuple(ids)
        _check_strings(self.ids)
        if "" in self.ids:
            raise ConfigurationError("A user id is empty; give each user a non-empty id.")
        self._row_of = {user_id: row for row, user_id in enumerate(self.ids, start=1)}
        if len(self._row_of) != len(self.ids):
            seen: set[str] = set()
            twice = next(user_id for user_id in self.ids if user_id in seen or seen.add(user_id))  # type: ignore[func-returns-value]
            raise ConfigurationError(f"The user id {twice!r} is twice in the vocabulary; give each user one row.")

    def plus(self, *user_ids: str) -> UserVocabulary:
        """Return a vocabulary with more users in new rows at the end; much faster than building a new one.

        Raises:
            ConfigurationError: An id is already in the vocabulary, or is given twice.
        """
        more = UserVocabulary(())
        more.ids, more._row_of = (*self.ids, *user_ids), dict(self._row_of)
        for row, user_id in enumerate(user_ids, start=len(self)):
            if more._row_of.setdefault(user_id, row) != row:
                raise ConfigurationError(f"The user id {user_id!r} is in the vocabulary already.")
        return more

    def __len__(self) -> int:
        """Return the number of rows of the user table, with the generic user's."""
        return len(self.ids) + 1

    def __contains__(self, user_id: object) -> bool:
        return user_id in self._row_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserVocabulary) and self.ids == other.ids

    def __hash__(self) -> int:
        return hash(self.ids)

    def rows(self, user_ids: Sequence[str]) -> Tensor:
        """Return the row of each user, `[B]` int64; 0 for unknown users.

        Raises:
            ConfigurationError: An id is not a string; as a number it would silently be unknown.
        """
        _check_strings(user_ids)
        return torch.tensor([self._row_of.get(user_id, 0) for user_id in user_ids], dtype=torch.long)

    def digest(self) -> str:
        """Return a hash of the ids and their order."""
        digest = hashlib.sha256()
        for user_id in self.ids:
            raw = user_id.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)  # the length, so that ["a", "bc"] is not ["ab", "c"]
        return digest.hexdigest()


def _check_strings(user_ids: Sequence[str]) -> None:
    if set(map(type, user_ids)) <= {str}:  # fast path for millions of ids
        return
    for user_id in user_ids:
        if not isinstance(user_id, str):
            raise ConfigurationError(
                f"The user id {user_id!r} is of type {type(user_id).__name__}; ids are strings: {str(user_id)!r}."
            )


_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,2})?")
_MISSING_VALUES = frozenset(
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
_MOST = 300_000  # with more ids, `remark` skips the search for look-alikes


def look_alikes(user_ids: Iterable[str]) -> list[list[str]]:
    """Return groups of different ids that look alike; groups and their ids are in order of appearance.

    Ids look alike if they differ only in case, spaces around or between words, invisible characters, composed (NFC) or
    decomposed (NFD) letters, full-width forms, or the spelling of a number (`7`, `7.0`, `07`, `7e0`).
    """
    groups: dict[str, list[str]] = {}
    for user_id in dict.fromkeys(user_ids):
        groups.setdefault(_key(user_id), []).append(user_id)
    return [group for group in groups.values() if len(group) > 1]


def stands_for_nobody(user_id: str) -> bool:
    """Return whether an id looks like a missing value, such as `null` or `nan`."""
    return _visible(user_id).casefold() in _MISSING_VALUES or not _visible(user_id)


def has_hidden_characters(user_id: str) -> bool:
    """Return whether an id has surrounding spaces or invisible characters."""
    return user_id != user_id.strip() or any(map(_is_hidden, user_id))


def from_pandas(user_ids: Iterable[str]) -> bool:
    """Return whether all ids are numbers that end in `.0`, as pandas writes integers of a column with gaps."""
    ids = list(user_ids)
    return bool(ids) and all(re.fullmatch(r"\d+\.0", user_id) for user_id in ids)


def remark(user_ids: Iterable[str]) -> str | None:
    """Return a short remark about suspicious ids, or None."""
    ids = list(dict.fromkeys(user_ids))
    if len(ids) > _MOST:
        return None
    groups = look_alikes(ids)
    remarks = []
    if groups:
        shown = ", ".join(" and ".join(map(repr, group[:3])) for group in groups[:3])
        remarks.append(f"{len(groups):,} groups of user ids that look alike, of one person each? ({shown})")
    if missing := [user_id for user_id in ids if stands_for_nobody(user_id)]:
        remarks.append(f"user ids that look like a missing value: {', '.join(map(repr, missing[:3]))}")
    if remarks:
        remarks[-1] += "; `data check` shows more"
    return "; ".join(remarks) or None


def _key(user_id: str) -> str:
    text = _visible(unicodedata.normalize("NFKC", user_id)).casefold()
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        return f"{number.normalize():f}" if number else "0"
    return unicodedata.normalize("NFKC", text)


def _visible(user_id: str) -> str:
    """Return an id without invisible characters, and with single spaces between its words."""
    if user_id.isascii() and user_id.isprintable():  # fast path
        return " ".join(user_id.split())
    return " ".join("".join(" " if char.isspace() else char for char in user_id if not _is_hidden(char)).split())


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cf", "Cc") and not char.isspace()
