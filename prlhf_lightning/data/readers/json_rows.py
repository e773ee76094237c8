"""JSON Lines and JSON arrays."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from prlhf_lightning.data.readers.text import Items, Row, Unreadable, chunks, decoded, pieces
from prlhf_lightning.errors import FeedbackFormatError, Place


class _Decoder(json.JSONDecoder):
    """Notes keys that stand twice in one object, of which JSON keeps the last without a word.

    Attributes:
        twins: Such keys of what was decoded since the list was last emptied.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twins: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            self.twins += [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        return row

    def row(self, value: Any, where: str) -> Row:
        """Return what was decoded, if it is a row."""
        twins, self.twins = self.twins, []
        if not isinstance(value, dict):
            raise FeedbackFormatError(
                f"is a JSON {type(value).__name__}",
                'each row must be an object such as {"user_id": ..., "prompt": ..., "chosen": ..., "rejected": ...}',
                where=where,
            )
        if twins:
            raise FeedbackFormatError(
                f"key {twins[0]!r} stands twice in one object",
                "remove one of the two",
                where=where,
                kind="a key stands twice in one object",
            )
        return value


def read_jsonl(path: Path) -> Items:
    """Read an object a line; after one that cannot be read, go on with the next line."""
    decoder, file = _Decoder(), str(path)
    for number, raw in pieces(path):
        where = Place(file, number)
        try:
            line = decoded(path, number, raw)
            if line.isspace() or not line:  # a file that is a byte order mark alone has an empty line
                continue
            yield where, decoder.row(_parsed(decoder, line, where), where)
        except FeedbackFormatError as error:
            decoder.twins.clear()
            yield where, Unreadable(error, raw.decode("utf-8", "backslashreplace"))


def _parsed(decoder: _Decoder, line: str, where: Place) -> Any:
    try:
        return decoder.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        problem = f"broken JSON at column {error.colno} ({error.msg})"
        fix = "each line must be one whole JSON object"
        raise FeedbackFormatError(problem, fix, where=where, kind="broken JSON") from None
    except (ValueError, RecursionError) as error:
        _beyond_json(where, error)


def _beyond_json(where: Place, error: Exception) -> NoReturn:
    """Refuse what is JSON by its grammar, but a number of thousands of digits or nested thousands deep."""
    deep = isinstance(error, RecursionError)
    kind = "the JSON is nested too deeply" if deep else "the JSON holds a number too long to read"
    problem = kind if deep else f"{kind} ({error})"
    raise FeedbackFormatError(problem, "mend the row or drop it", where=where, kind=kind) from None


def read_json(path: Path) -> Items:
    """Read an array of objects, or JSON Lines that go by the name .json, as many tools write them."""
    start = next((piece.lstrip() for piece in chunks(path) if piece.strip()), "")
    yield from _read_array(path) if start.startswith("[") else read_jsonl(path)


def _read_array(path: Path) -> Items:
    """Decode the objects of a JSON array one by one from a buffer that holds little more than one of them.

    Arrays often are one long line, so that a row is named by its number too.
    """
    decoder, file = _Decoder(), str(path)
    pieces = chunks(path)
    buffer, position, line, opened, number = next(pieces, ""), 0, 1, False, 1
    while True:
        # Skip what stands between objects, counting lines.
        while position < len(buffer) and (buffer[position] in " \t\r\n" or buffer[position] in (",[", ",")[opened]):
            line += buffer[position] == "\n"
            opened = opened or buffer[position] == "["
            position += 1
        if position == len(buffer):
            buffer, position = next(pieces, ""), 0
            if not buffer:
                where = Place(file, line, number)
                raise FeedbackFormatError("the JSON array is cut short here", "it must end in ]", where=where)
            continue
        if buffer[position] == "]":
            if any(rest.strip() for rest in itertools.chain([buffer[position + 1 :]], pieces)):
                raise FeedbackFormatError(
                    "the JSON array ends here, but the file goes on",
                    "write one array, or one object a line",
                    where=Place(file, line),
                )
            return
        where = Place(file, line, number)
        try:
            decoder.twins.clear()  # of an object that was not whole
            row, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            # An object that goes on in the next chunk fails at the buffer's end or as an open string: read on.
            unfinished = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated string")
            more = next(pieces, "") if unfinished else ""
            if more:
                buffer, position = buffer[position:] + more, 0
                continue
            broken = line + buffer.count("\n", position, error.pos)
            raise FeedbackFormatError(
                f"broken JSON ({error.msg})",
                "the file must be an array of objects, [{...}, {...}]",
                where=Place(file, broken, number),
                kind="broken JSON",
            ) from None
        except (ValueError, RecursionError) as error:
            _beyond_json(where, error)
        try:
            yield where, decoder.row(row, where)
        except FeedbackFormatError as error:
            yield where, Unreadable(error, row)
        line += buffer.count("\n", position, end)
        position, number = end, number + 1
