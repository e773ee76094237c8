"""Search for many byte strings in one pass over a file; the time does not depend on the number of strings."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import quote, quote_plus

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prlhf_lightning.training.checkpoint_entry import KEY

_BLOCK = 8 << 20  # bytes in memory at once
_HEAD = 1 << 16  # first bytes, by which a text is recognized: it has no zero bytes
_WIDTHS = (8, 4, 2, 1)  # window sizes in bytes; the widest that fits in a string is used
_TABLE_BITS = 20
_MIX = 0x9E37_79B9_7F4A_7C15  # spreads windows over the table (Knuth, multiplicative hashing)
_LOOK_BACK = 10  # bytes of the longest escape, \U0001f600
_IN_WORDS = np.zeros(256, np.bool_)
_IN_WORDS[[byte for byte in range(128) if chr(byte).isalnum()]] = True

_Places: TypeAlias = npt.NDArray[np.int64]


class Stream(Protocol):
    """A readable stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and none at the end."""


class ByteSearch:
    """Finds byte strings in a stream.

    Each string has a window of up to 8 bytes, and all windows of the stream are looked up in a table of these. For each
    hit the whole string is compared. Memory: some blocks of 8 MB, and the strings.

    Args:
        strings: The strings; empty ones are ignored.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        self._strings = frozenset(string for string in strings if string)
        self._windows = _windows_of(self._strings)
        self._overlap = max(map(len, self._strings), default=0) + _LOOK_BACK + 1

    def found_in(
        self, stream: Stream, progress: Callable[[int], object] = lambda _: None, text: bool | None = None
    ) -> set[bytes]:
        """Return the strings that occur in a stream.

        In a text, a string that begins or ends with an ASCII letter or digit must not be part of a longer word:
        `ann` does not occur in `annabel`, but in `ann@example.org` and after an escape such as that of a line break.

        Args:
            stream: Read once, from its current position.
            progress: Called with the number of new bytes.
            text: Whether it is a text; by default, if its beginning has no zero bytes.
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


_PLAIN = re.compile(r"[0-9A-Za-z_.-]*")  # of which no format quotes anything
_ESCAPE = re.compile(r"(?<=\\)([xuU])([0-9a-f]+)")
_NORMAL_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le")  # of spreadsheets, and of numpy
_IN_PAGES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&'"})  # JSON in a page


def id_bytes(user_id: str) -> bytes:
    """Return the bytes of an id in a file."""
    return user_id.encode("utf-8", "surrogatepass")


def written_forms(user_id: str) -> set[bytes]:
    """Return the possible forms of an id in a file: quoted as in CSV, JSON, YAML, Python, HTML and URLs, once or twice.

    Also in other normal forms of Unicode, as file systems and editors make them, and in other encodings.
    """
    texts = {user_id, *(unicodedata.normalize(form, user_id) for form in _NORMAL_FORMS)}
    if not _PLAIN.fullmatch(user_id):
        for _ in range(2):  # for instance JSON in a cell of a CSV file
            texts |= {form for text in texts for form in _quoted(text)}
    found = {id_bytes(text) for text in texts}
    for encoding in (*_WIDE, "cp1252"):
        try:
            found.add(user_id.encode(encoding))
        except UnicodeEncodeError:
            continue
    return found


class IdSearch:
    """Finds ids in a stream of bytes.

    Args:
        user_ids: The ids.
    """

    def __init__(self, user_ids: Iterable[str]) -> None:
        self._of_form: dict[bytes, list[str]] = {}
        for user_id in user_ids:
            for form in written_forms(user_id):
                self._of_form.setdefault(form, []).append(user_id)
        self._search = ByteSearch(self._of_form)

    def named_in(self, stream: Stream, progress: Callable[[int], object] = lambda _: None) -> set[str]:
        """Return the ids that a stream names; see `ByteSearch.found_in` for how."""
        return {user_id for form in self._search.found_in(stream, progress) for user_id in self._of_form[form]}


def _quoted(text: str) -> Iterator[str]:
    as_json = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    as_python = [repr(text)[1:-1], ascii(text)[1:-1]]
    yield from as_json
    yield from as_python
    yield from (_ESCAPE.sub(lambda found: found[1] + found[2].upper(), form) for form in (*as_json, *as_python))
    yield as_json[0].replace("/", "\\/")
    yield as_json[0].translate(_IN_PAGES)
    yield from (text.replace(sign, 2 * sign) for sign in ('"', "'"))
    escaped = html.escape(text)
    yield from (escaped, html.escape(text, quote=False), escaped.replace("&#x27;", "&#39;").replace("&quot;", "&#34;"))
    in_url = quote(text, safe="", errors="surrogatepass")
    yield from (in_url, in_url.replace(".", "%2E"), quote(text, errors="surrogatepass"))
    yield quote_plus(text, errors="surrogatepass")


#: The keys that lead to a text in a checkpoint, from the outermost.
Place: TypeAlias = tuple[str, ...]

_LEAST_BYTES = 8  # fewer occur in other numbers by chance
_ROWS = 4096  # of a table, in memory at once
# Parts that Lightning writes: names of weights, counts and settings.
_WITHOUT_USERS = {"state_dict", "loops", "optimizer_states", "lr_schedulers"}
_WITHOUT_USERS |= {"hparams_name", "hparams_type", "hyper_parameters", "datamodule_hyper_parameters"}
_WITHOUT_USERS |= {"pytorch-lightning_version", "native_amp_scaling_state", "MixedPrecision"}
# Callbacks of this package that keep something in checkpoints.
_CALLBACKS = {"BestAndLast", "CollapseMonitor"}


class Vectors:
    """The vectors of erased users, except uninformative ones.

    Uninformative are rows of zeros, rows below 8 bytes, and rows that equal one of a remaining user, such as an
    untrained row that equals the generic user's.

    Args:
        tables: Stored tensors of all users, each `[rows, ...]`.
        rows: Rows of the erased users.
        stay: For each of the first tables, one more row that stays.
    """

    def __init__(self, tables: Sequence[Tensor], rows: Sequence[int], stay: Sequence[Tensor] = ()) -> None:
        self._rows_of: dict[bytes, set[int]] = {}
        for number, table in enumerate(tables):
            gone = torch.zeros(len(table), dtype=torch.bool)
            gone[list(rows)] = True
            own: dict[bytes, set[int]] = {}
            for row, raw in zip(rows, _raw_rows(table[list(rows)]), strict=True):
                own.setdefault(raw, set()).add(row)
            for start in range(0, len(table), _ROWS):
                some = table[start : start + _ROWS]
                for raw in _raw_rows(some[~gone[start : start + len(some)]]):
                    own.pop(raw, None)
            for new in stay[number : number + 1]:
                own.pop(next(_raw_rows(new[None].to(table.dtype))), None)
            for raw, whose in own.items():
                if len(raw) >= _LEAST_BYTES and any(raw):
                    self._rows_of.setdefault(raw, set()).update(whose)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows_of)

    def count(self, row: int) -> int:
        """Return the number of vectors of a user."""
        return self._counts[row]

    def whose(self, raw: Iterable[bytes]) -> set[int]:
        """Return the row numbers of the given vectors."""
        return {row for one in raw for row in self._rows_of.get(one, ())}

    @cached_property
    def _counts(self) -> Counter[int]:
        return Counter(row for whose in self._rows_of.values() for row in whose)


def _raw_rows(table: Tensor) -> Iterator[bytes]:
    rows = table.reshape(len(table), -1).contiguous()
    if rows.numel():
        raw = rows.view(torch.uint8).numpy()
        yield from (row.tobytes() for row in raw)
    else:
        yield from (b"" for _ in range(len(table)))


def texts(content: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield every text in a checkpoint, including keys and settings, each with its path of keys."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            below = (*place, str(key))
            yield from texts(key, below)
            yield from texts(value, below)
    elif isinstance(content, list | tuple | set | frozenset):
        for number, value in enumerate(content):
            yield from texts(value, (*place, str(number)))
    elif hasattr(content, "__dict__") and not isinstance(content, Tensor):
        yield from texts(vars(content), place)


def is_of_no_user(place: Place) -> bool:
    """Return whether the text at a path of a checkpoint is a name or a setting that does not depend on users.

    This includes names of the checkpoint's parts, and content of Lightning and this package, except the list of users.
    Unknown parts may hold anything, and so may the state of other callbacks.
    """
    part, *below = place
    if not below or part in _WITHOUT_USERS:
        return True
    if part == "callbacks":
        from lightning.pytorch import callbacks  # here, since it takes seconds that `--help` should not

        name = re.match(r"\w*", below[0])[0]  # type: ignore[index]  # it matches always
        return name in _CALLBACKS or hasattr(callbacks, name)
    return part == KEY and (below == ["users"] or below[0] != "users")
