"""Which of many byte strings a file holds, found in one pass: the time grows with the file and not with the strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

_BLOCK = 8 << 20  # bytes in memory at once
_HEAD = 1 << 16  # bytes that tell a text from other files: a text has no zero bytes
_WIDTHS = (8, 4, 2, 1)  # bytes of a string by which places are told where it may stand; the widest that it has
_TABLE_BITS = 20
_MIX = 0x9E37_79B9_7F4A_7C15  # spreads windows over the table (Knuth, multiplicative hashing)
_LOOK_BACK = 10  # bytes of the longest escape, \U0001f600
_IN_WORDS = np.zeros(256, np.bool_)
_IN_WORDS[[byte for byte in range(128) if chr(byte).isalnum()]] = True

_Places: TypeAlias = npt.NDArray[np.int64]


class Stream(Protocol):
    """What bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and none at the end."""


class ByteSearch:
    """Finds which of some byte strings a stream holds.

    A window of up to 8 bytes is taken of each string, and all windows of the stream are looked up in a table of these.
    Where one is found, the whole string is compared. Memory: some blocks of 8 MB, and the strings.

    Args:
        strings: What is looked for; those that are empty are left out.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        self._strings = frozenset(string for string in strings if string)
        self._windows = _windows_of(self._strings)
        self._overlap = max(map(len, self._strings), default=0) + _LOOK_BACK + 1

    def found_in(
        self, stream: Stream, progress: Callable[[int], object] = lambda _: None, text: bool | None = None
    ) -> set[bytes]:
        """Return those of the strings that occur in a stream.

        In a text, a string that begins or ends with a letter or digit (of ASCII) must be no part of a longer word:
        `ann` does not occur in `annabel`, but in `ann@example.org` and after an escape such as that of a line break.

        Args:
            stream: Read once, from where it stands.
            progress: Told how many bytes more are done.
            text: Whether it is a text; without zero bytes at its beginning, it is taken for one.
        """
        found: set[bytes] = set()
        windows, wanted = self._windows, self._strings
        kept, skip = b"", 0
        while wanted and (new := stream.read(_BLOCK)):
            if text is None:
                text = b"\0" not in new[:_HEAD]
            block = kept + new
            now = set(_matches(block, windows, wanted, text, skip, is_end=False))
            kept, skip = block[-self._overlap :], _LOOK_BACK if len(block) > self._overlap else skip
            progress(len(new))
            if now:
                found |= now
                wanted = self._strings - found
                windows = _windows_of(wanted) if len(new) == _BLOCK else windows  # a file may go on
        if text and wanted:  # what the end of the file was too near to
            found.update(_matches(kept, windows, wanted, text, skip, is_end=True))
        return found


@dataclass(frozen=True)
class _Windows:
    """The windows of those strings that share a width.

    Attributes:
        width: Bytes of a window.
        values: `[N]` the windows as numbers, sorted, each once.
        table: By the hash of a window, whether there is one.
        strings: By the window: where it begins in a string, and how long the string is.
    """

    width: int
    values: npt.NDArray[np.unsignedinteger[Any]]
    table: npt.NDArray[np.bool_]
    strings: dict[int, set[tuple[int, int]]]

    def places(self, raw: bytes) -> Iterator[tuple[_Places, list[int]]]:
        """Yield where windows stand in a block, and which."""
        for offset in range(min(self.width, len(raw))):
            count = (len(raw) - offset) // self.width
            view = np.frombuffer(raw, f"<u{self.width}", count, offset)
            hits = np.flatnonzero(self.table[_hashed(view)])
            values = view[hits]
            known = self.values[np.minimum(np.searchsorted(self.values, values), len(self.values) - 1)] == values
            yield hits[known] * self.width + offset, values[known].tolist()


def _windows_of(strings: Iterable[bytes]) -> list[_Windows]:
    by_width: dict[int, dict[int, set[tuple[int, int]]]] = {}
    for string in strings:
        width = next(width for width in _WIDTHS if width <= len(string))
        # Zeros are everywhere in files of numbers; a window of what comes after them is in fewer places.
        start = min(len(string) - len(string.lstrip(b"\0")), len(string) - width)
        value = int.from_bytes(string[start : start + width], "little")
        by_width.setdefault(width, {}).setdefault(value, set()).add((start, len(string)))
    found = []
    for width, of_strings in by_width.items():
        values = np.array(sorted(of_strings), f"<u{width}")
        table = np.zeros(1 << _TABLE_BITS, np.bool_)
        table[_hashed(values)] = True
        found.append(_Windows(width, values, table, of_strings))
    return found


def _hashed(windows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return places in the table: the windows themselves where they have up to two bytes."""
    if windows.itemsize <= 2:
        return windows
    bits = 8 * windows.itemsize
    kind = windows.dtype.type
    places: npt.NDArray[Any] = (windows * kind(_MIX % (1 << bits))) >> kind(bits - _TABLE_BITS)
    return places


def _matches(
    block: bytes, windows: Sequence[_Windows], wanted: frozenset[bytes], text: bool, skip: int, is_end: bool
) -> Iterator[bytes]:
    """Yield the strings in a block.

    Those that begin in its first `skip` bytes are of the block before. In a text that goes on, those at its very end
    are left to the next block.
    """
    raw = np.frombuffer(block, np.uint8)
    last = len(block) - (text and not is_end)
    for some in windows:
        for places, values in some.places(block):
            begins = ~_within_word(raw, places) if text else np.ones(len(places), np.bool_)
            for place, value, begins_word in zip(places.tolist(), values, begins.tolist(), strict=True):
                for start, length in some.strings[value]:
                    begin, end = place - start, place - start + length
                    if begin < skip or end > last or (string := block[begin:end]) not in wanted:
                        continue
                    ends_word = end == len(block) or not (_IN_WORDS[block[end - 1]] and _IN_WORDS[block[end]])
                    # Another string may have this window elsewhere; those with a start begin with a zero, not a word.
                    if not text or (ends_word and (block[begin] == 0 if start else begins_word)):
                        yield string


def _within_word(raw: npt.NDArray[np.uint8], places: _Places) -> npt.NDArray[np.bool_]:
    """Return which places of a text are in a word, and not at its beginning."""

    def before(distance: int) -> npt.NDArray[np.uint8]:
        return np.where(places >= distance, raw[np.maximum(places - distance, 0)], 0)

    within = _IN_WORDS[raw[places]] & _IN_WORDS[before(1)]
    if within.any():
        escaped = (before(2) == ord("\\")) | (before(3) == ord("%"))
        for length, letter in ((4, "x"), (6, "u"), (10, "U")):
            escaped |= (before(length) == ord("\\")) & (before(length - 1) == ord(letter))
        within &= ~escaped
    return within
