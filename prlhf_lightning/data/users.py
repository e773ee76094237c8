"""Which row of the user table belongs to whom."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError


class UserVocabulary:
    """Maps user ids, which are arbitrary strings, to rows of the user table.

    Row 0 is the generic user `u_0` of arXiv:2402.05133; the first id has row 1. An id that is not in the vocabulary
    is a person whom training has not met and resolves to the generic user. `list(vocabulary.ids)` is all that a
    checkpoint needs to hold: `UserVocabulary(ids)` gives the same vocabulary again.

    Args:
        ids: The known users, in the order of their rows.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids: tuple[str, ...] = tuple(ids)
        _check_strings(self.ids)
        if "" in self.ids:
            raise ConfigurationError("A user id is empty; give each user an id that is not.")
        self._row_of = {user_id: row for row, user_id in enumerate(self.ids, start=1)}
        if len(self._row_of) != len(self.ids):
            seen: set[str] = set()
            twice = next(user_id for user_id in self.ids if user_id in seen or seen.add(user_id))  # type: ignore[func-returns-value]
            raise ConfigurationError(f"The user id {twice!r} stands twice in the vocabulary; give each user one row.")

    def plus(self, user_id: str) -> UserVocabulary:
        """Return a vocabulary with one more user, in the row after the last; far quicker than making one anew."""
        if user_id in self:
            raise ConfigurationError(f"The user id {user_id!r} is in the vocabulary already.")
        more = UserVocabulary(())
        more.ids, more._row_of = (*self.ids, user_id), {**self._row_of, user_id: len(self)}
        return more

    def __len__(self) -> int:
        """Return the number of rows of the user table, the generic user's included."""
        return len(self.ids) + 1

    def __contains__(self, user_id: object) -> bool:
        return user_id in self._row_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserVocabulary) and self.ids == other.ids

    def __hash__(self) -> int:
        return hash(self.ids)

    def rows(self, user_ids: Sequence[str]) -> Tensor:
        """Return the row of each user, `[B]` int64; 0 for users that training has not met.

        Raises:
            ConfigurationError: An id is no string: a number would be taken for a stranger.
        """
        _check_strings(user_ids)
        return torch.tensor([self._row_of.get(user_id, 0) for user_id in user_ids], dtype=torch.long)

    def digest(self) -> str:
        """Return a hash that tells vocabularies apart, order included."""
        digest = hashlib.sha256()
        for user_id in self.ids:
            raw = user_id.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)  # the length, so that ["a", "bc"] is not ["ab", "c"]
        return digest.hexdigest()


def _check_strings(user_ids: Sequence[str]) -> None:
    if set(map(type, user_ids)) <= {str}:  # quick, for millions
        return
    for user_id in user_ids:
        if not isinstance(user_id, str):
            raise ConfigurationError(
                f"The user id {user_id!r} is of type {type(user_id).__name__}; ids are strings: {str(user_id)!r}."
            )
