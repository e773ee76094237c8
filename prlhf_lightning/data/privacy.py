"""Pseudonyms: keyed hashes that replace user ids, so the ids never leave the data."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prlhf_lightning.data.conversations import check_characters
from prlhf_lightning.data.records import Columns
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.errors import ConfigurationError

_LEAST = 16  # bytes of a salt; a shorter salt could be found by brute force
_MAKE = "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"


class Pseudonyms:
    """Maps a user id to the first 128 bits of its HMAC-SHA256 under a secret salt, in hexadecimal digits.

    Without the salt, a pseudonym cannot be computed from an id, nor traced back by trying ids. The same salt gives the
    same pseudonyms in every run, so checkpoints fit new data. The salt is held only in memory.

    Args:
        salt: The secret, at least 16 bytes.
    """

    def __init__(self, salt: bytes) -> None:
        if len(salt) < _LEAST:
            raise ConfigurationError(f"The salt for users' ids has {len(salt)} bytes, fewer than {_LEAST}; {_MAKE}")
        self.__salt = salt

    @classmethod
    def load(cls, where: str) -> Pseudonyms:
        """Read the salt from an environment variable or a file; strip surrounding white space.

        Args:
            where: Name of the variable (letters, digits and `_`), or path of the file (with any other character, such
                as `./salt`).

        Raises:
            ConfigurationError: There is no such variable or file, or the salt is too short.
        """
        if re.fullmatch(r"[A-Za-z_]\w*", where, re.ASCII):
            salt = os.environ.get(where)
            if salt is None:
                raise ConfigurationError(
                    f"hash_user_ids_with: the environment variable {where} is not set; set it to the salt, or give a "
                    f"file that holds it (as ./{where}); {_MAKE}"
                )
            return cls(salt.strip().encode("utf-8", "surrogateescape"))
        try:
            return cls(Path(where).expanduser().read_bytes().strip())
        except OSError as error:
            raise ConfigurationError(
                f"hash_user_ids_with: the file {where} cannot be read ({error.strerror}); write the salt to it; {_MAKE}"
            ) from None

    def __call__(self, user_id: str) -> str:
        """Return the pseudonym of a user."""
        return hmac.digest(self.__salt, user_id.encode(), "sha256").hex()[:32]

    def fingerprint(self) -> str:
        """Return an identifier of the salt that does not reveal it, for cache keys."""
        return hmac.digest(self.__salt, b"which salt is this", "sha256").hex()[:16]

    def __repr__(self) -> str:
        return "Pseudonyms(salt=<hidden>)"


class PseudonymousSource(DataSource):
    """The rows of a source, with pseudonyms instead of user ids.

    Args:
        source: Source of the rows.
        pseudonyms: Replacement of ids; invalid ids are kept, and validation rejects them.
    """

    def __init__(self, source: DataSource, pseudonyms: Pseudonyms) -> None:
        self.columns = source.columns
        self._source, self._pseudonyms = source, pseudonyms

    def splits(self) -> set[Split]:
        """Return the splits of the source."""
        return self._source.splits()

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the rows of the source, each with its user's pseudonym."""
        column = Columns.from_mapping(self.columns).user_id
        for where, row in self._source.rows(split):
            user_id = row.get(column)
            if isinstance(user_id, str) and user_id.strip():
                check_characters(user_id, where, "user_id")
                row = {**row, column: self._pseudonyms(user_id)}
            yield where, row

    def fingerprint(self, split: Split) -> str:
        """Return the source's fingerprint with that of the salt."""
        kind = f"{type(self._source).__module__}.{type(self._source).__qualname__}"
        return f"{kind} {self._source.fingerprint(split)} {self._pseudonyms.fingerprint()}"


def hashed(source: DataSource, hash_user_ids_with: str | None) -> DataSource:
    """Return a source with hashed user ids (see `Pseudonyms.load`); with None, the source itself."""
    if hash_user_ids_with is None:
        return source
    return PseudonymousSource(source, Pseudonyms.load(hash_user_ids_with))
