"""Who judged which pair how, as hashes: 33 bytes a row, whatever the length of its texts.

Two texts in ten million share a 64-bit hash with a probability of three in a million.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.records import FeedbackRecord, Text
from prlhf_lightning.data.splits import text_key

_Rows = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Matches:
    """Rows that belong to earlier ones.

    Attributes:
        count: How many there are.
        rows: `[n]` the first of them, as numbers of rows in the order of the split.
        partners: `[n]` for each the earliest row that it belongs to.
    """

    count: int
    rows: _Rows
    partners: _Rows


@dataclass
class Judgements:
    """The judgements of a split.

    Attributes:
        users: Number of judgements of each user, in order of appearance.
    """

    users: dict[str, int] = field(default_factory=dict)
    _rows: array[int] = field(default_factory=lambda: array("Q"))
    _prompts: array[int] = field(default_factory=lambda: array("Q"))
    _pairs: array[int] = field(default_factory=lambda: array("Q"))
    _judged: array[int] = field(default_factory=lambda: array("Q"))
    _sides: array[int] = field(default_factory=lambda: array("B"))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int, record: FeedbackRecord) -> None:
        """Add the judgement in the row of a number."""
        prompt, chosen, rejected = (_key(text) for text in (record.prompt, record.chosen, record.rejected))
        pair = _mixed(prompt, *sorted((chosen, rejected)))  # the same whoever won
        self.users[record.user_id] = self.users.get(record.user_id, 0) + 1
        self._rows.append(row)
        self._prompts.append(prompt)
        self._pairs.append(pair)
        self._judged.append(_mixed(pair, text_key(record.user_id)))
        self._sides.append(chosen > rejected)

    def duplicates(self, most: int) -> Matches:
        """Return judgements that their user has made before: the same prompt, chosen and rejected."""
        _, first, group = np.unique(self._ballots(), return_index=True, return_inverse=True)
        again = np.flatnonzero(first[group] != np.arange(len(self)))
        return self._found(again, first[group[again]], most)

    def contradictions(self, most: int) -> Matches:
        """Return judgements whose opposite their user has made before; each user and pair once."""
        _, first = np.unique(self._ballots(), return_index=True)
        first.sort()
        _, earliest, group = np.unique(_array(self._judged)[first], return_index=True, return_inverse=True)
        later = np.flatnonzero(earliest[group] != np.arange(len(first)))
        return self._found(first[later], first[earliest[group[later]]], most)

    def leaked(self, training: Judgements, by: str, most: int) -> Matches:
        """Return judgements on what stands in training too, each with the first row of training that it stands in.

        Args:
            training: The judgements trained on.
            by: `prompt`; `pair`, the prompt with both completions; or `judgement`, a pair with its user.
            most: Up to how many are returned.
        """
        there, first = np.unique(training._by(by), return_index=True)
        mine = self._by(by)
        if not len(there):
            return Matches(0, *2 * [np.empty(0, np.int64)])
        place = np.minimum(np.searchsorted(there, mine), len(there) - 1)
        found = np.flatnonzero(there[place] == mine)
        rows = training._found(first[place[found]], first[place[found]], most).rows
        return Matches(len(found), _array(self._rows)[found[:most]].astype(np.int64), rows)

    def distinct(self, by: str) -> int:
        """Return the number of different prompts, pairs or judgements."""
        return len(np.unique(self._by(by)))

    def _by(self, by: str) -> _Keys:
        return _array({"prompt": self._prompts, "pair": self._pairs, "judgement": self._judged}[by])

    def _ballots(self) -> _Keys:
        """`[n]` hash of user, pair and the side that was chosen."""
        return _array(self._judged) ^ (_array(self._sides).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def _found(self, places: _Rows, partners: _Rows, most: int) -> Matches:
        rows = _array(self._rows)
        return Matches(len(places), *(rows[which[:most]].astype(np.int64) for which in (places, partners)))


def _array(values: array[int]) -> _Keys:
    return np.array(values, dtype=values.typecode)


def _key(text: Text | None) -> int:
    return 0 if text is None else text_key(text)


def _mixed(*keys: int) -> int:
    raw = b"".join(key.to_bytes(8, "little") for key in keys)
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")
