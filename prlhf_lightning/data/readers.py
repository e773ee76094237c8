"""Raw rows from files, one at a time, each with the line that it stands on.

JSON Lines, JSON arrays, CSV and Parquet; the first three also gzipped. Memory does not grow with the file. (Libraries
that read these formats report broken input without a line number, which is the first thing that a user needs.)
"""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

import pyarrow
import pyarrow.parquet

from prlhf_lightning.errors import FeedbackFormatError

Row: TypeAlias = Mapping[str, Any]
_CHUNK = 1 << 16  # bytes read at a time from a JSON array


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that cannot be read.

    Attributes:
        error: What is wrong with it.
        raw: What stands there, as far as it could be told, for whoever wants to mend it.
        rest: Whether all that follows in the file cannot be read either. It is then not known how many rows that is.
    """

    error: FeedbackFormatError
    raw: Any = None
    rest: bool = False


_Items: TypeAlias = Iterator[tuple[str, Row | Unreadable]]


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield every row of a file after where it stands, such as `votes.jsonl.gz:17`.

    Lines are counted from 1; in Parquet files, which have none, rows are. A row of a CSV file or of a JSON array that
    spans several lines is named by its first. Blank lines are skipped.

    Raises:
        FeedbackFormatError: The file is missing, empty, of an unknown kind, damaged or not UTF-8.
    """
    return _refusing(_items(Path(path)))


def scan_rows(path: str | Path) -> _Items:
    """Yield what `read_rows` does, but an `Unreadable` where that raises an error, and go on where the format allows.

    Lines of JSON Lines stand alone, so reading goes on after any of them. In other formats it goes on after a row that
    could be told from the next, and ends (`Unreadable.rest`) where damage leaves open where the next begins.
    """
    path = Path(path)
    try:
        yield from _items(path)
    except FeedbackFormatError as error:
        yield str(path), Unreadable(error, rest=True)


def _refusing(items: _Items) -> Iterator[tuple[str, Row]]:
    for where, row in items:
        if isinstance(row, Unreadable):
            raise row.error
        yield where, row


def _items(path: Path) -> _Items:
    reader = _reader(path)
    if not path.exists():
        raise FeedbackFormatError(f"{path}: there is no such file; check the path (it is relative to {Path.cwd()}).")
    if not path.is_file():
        raise FeedbackFormatError(f"{path}: is a directory; name the files in it, as one path or a list of paths.")
    return _not_empty(path, reader(path))


def _reader(path: Path) -> Callable[[Path], _Items]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if suffixes and suffixes[-1] == ".parquet":
        return _read_parquet
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in readers:
        raise FeedbackFormatError(
            f"{path}: unknown kind of file; the name must end in .jsonl, .json or .csv (each may have .gz after it) "
            "or .parquet."
        )
    return readers[suffixes[-1]]


def _not_empty(path: Path, rows: _Items) -> _Items:
    empty = True
    for item in rows:
        empty = False
        yield item
    if empty:
        raise FeedbackFormatError(f"{path}: has no rows; write at least one row of feedback, or leave the file out.")


def _pieces(path: Path, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, or pieces of a given size, after the number of the line that each starts on."""
    line = 1
    try:
        with _open(path) as file:
            for raw in file if size is None else iter(lambda: file.read(size), b""):
                yield line, raw
                line += raw.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FeedbackFormatError(
            f"{path}:{line}: the gzip data is damaged or cut short here ({error}); copy or compress it again."
        ) from None
    except OSError as error:
        raise FeedbackFormatError(f"{path}: cannot be read ({error}); check the file and who may read it.") from None


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in _pieces(path):
        yield number, _decoded(path, number, raw)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        _not_utf8(path, number, error)


def _chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for line, raw in _pieces(path, _CHUNK):
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            _not_utf8(path, line + error.object[: error.start].count(b"\n"), error)
        if text:
            yield text
    if decoder.getstate()[0]:
        raise FeedbackFormatError(f"{path}: ends in the middle of a UTF-8 character; save the whole file as UTF-8.")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> NoReturn:
    raise FeedbackFormatError(
        f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8."
    ) from None


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
                f"{where}: is a JSON {type(value).__name__}; each row must be an object such as "
                '{"user_id": ..., "prompt": ..., "chosen": ..., "rejected": ...}.'
            )
        if twins:
            raise FeedbackFormatError(f"{where}: key {twins[0]!r} stands twice in one object; remove one of the two.")
        return value


def _read_jsonl(path: Path) -> _Items:
    decoder = _Decoder()
    for number, raw in _pieces(path):
        where = f"{path}:{number}"
        try:
            line = _decoded(path, number, raw)
            if line.isspace() or not line:  # a file that is a byte order mark alone has an empty line
                continue
            yield where, decoder.row(_parsed(decoder, path, number, line), where)
        except FeedbackFormatError as error:
            decoder.twins.clear()
            yield where, Unreadable(error, raw.decode("utf-8", "backslashreplace"))


def _parsed(decoder: _Decoder, path: Path, number: int, line: str) -> Any:
    try:
        return decoder.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise FeedbackFormatError(
            f"{path}:{number}: broken JSON at column {error.colno} ({error.msg}); "
            "each line must be one whole JSON object."
        ) from None
    except (ValueError, RecursionError) as error:
        _beyond_json(path, number, error)


def _beyond_json(path: Path, line: int, error: Exception) -> NoReturn:
    """Refuse what is JSON by its grammar, but a number of thousands of digits or nested thousands deep."""
    what = "is nested too deeply" if isinstance(error, RecursionError) else f"holds a number too long to read ({error})"
    raise FeedbackFormatError(f"{path}:{line}: the JSON {what}; mend the row or drop it.") from None


def _read_json(path: Path) -> _Items:
    """Read an array of objects, or JSON Lines that go by the name .json, as many tools write them."""
    start = next((piece.lstrip() for piece in _chunks(path) if piece.strip()), "")
    yield from _read_array(path) if start.startswith("[") else _read_jsonl(path)


def _read_array(path: Path) -> _Items:
    """Decode the objects of a JSON array one by one from a buffer that holds little more than one of them."""
    decoder = _Decoder()
    pieces = _chunks(path)
    buffer, position, line, opened = next(pieces, ""), 0, 1, False
    while True:
        # Skip what stands between objects, counting lines.
        while position < len(buffer) and (buffer[position] in " \t\r\n" or buffer[position] in (",[", ",")[opened]):
            line += buffer[position] == "\n"
            opened = opened or buffer[position] == "["
            position += 1
        if position == len(buffer):
            buffer, position = next(pieces, ""), 0
            if not buffer:
                raise FeedbackFormatError(f"{path}:{line}: the JSON array is cut short here; it must end in ].")
            continue
        if buffer[position] == "]":
            if any(rest.strip() for rest in itertools.chain([buffer[position + 1 :]], pieces)):
                raise FeedbackFormatError(
                    f"{path}:{line}: the JSON array ends here, but the file goes on; write one array, or one object a "
                    "line."
                )
            return
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
            number = line + buffer.count("\n", position, error.pos)
            raise FeedbackFormatError(
                f"{path}:{number}: broken JSON ({error.msg}); the file must be an array of objects, [{{...}}, {{...}}]."
            ) from None
        except (ValueError, RecursionError) as error:
            _beyond_json(path, line, error)
        where = f"{path}:{line}"
        try:
            yield where, decoder.row(row, where)
        except FeedbackFormatError as error:
            yield where, Unreadable(error, row)
        line += buffer.count("\n", position, end)
        position = end


def _read_csv(path: Path) -> _Items:
    csv.field_size_limit(1 << 30)  # the standard limit of 128 kB is shorter than a long conversation
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    start = 1
    try:
        header = next((values for values in reader if values), [])
        start = reader.line_num + 1
        _refuse_twins(path, header)
        _refuse_other_separators(path, header)
        for values in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                error = FeedbackFormatError(
                    f"{where}: has {len(values)} values but the header names {len(header)} columns; "
                    'put values that hold commas, quotes or line breaks in double quotes (" inside them doubled).'
                )
                yield where, Unreadable(error, values)
                continue
            # CSV knows no null: an empty cell is one where that is allowed, and "is null" where it is not.
            yield where, {name: value or None for name, value in zip(header, values, strict=True)}
    except csv.Error as broken:
        raise FeedbackFormatError(
            f'{path}:{start}: broken CSV ({broken}); put values in double quotes, with " inside them doubled.'
        ) from None


def _refuse_twins(path: Path, columns: list[str]) -> None:
    """Refuse two columns of one name, of which only one could be read. Columns without a name are nobody's."""
    for number, name in enumerate(columns):
        if name and name in columns[:number]:
            raise FeedbackFormatError(
                f"{path}: column {name!r} stands twice (columns {columns.index(name) + 1} and {number + 1}); "
                "rename or remove one of them."
            )


def _refuse_other_separators(path: Path, header: list[str]) -> None:
    """Refuse a file of which commas make one column, and another usual separator several."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and header[0].count(mark) > 1:
            raise FeedbackFormatError(f"{path}:1: the columns are separated by {name}; save it with commas instead.")


def _read_parquet(path: Path) -> _Items:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _refuse_twins(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for row in _python_rows(batch):
                    number += 1
                    where = f"{path}:{number}"
                    if isinstance(row, Exception):
                        told = f"{where}: has a value that cannot be read ({row}); mend or drop it."
                        yield where, Unreadable(FeedbackFormatError(told))
                    else:
                        yield where, row
            if number != (told_of := file.metadata.num_rows):  # a damaged length reads as fewer rows
                raise FeedbackFormatError(
                    f"{path}: is damaged after row {number}: it should have {told_of} rows; write it again."
                )
    except FeedbackFormatError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number}" if number else ""
        raise FeedbackFormatError(f"{path}: is no readable Parquet file{after} ({error}); write it again.") from None


def _python_rows(batch: Any) -> Iterator[Row | Exception]:
    """Yield the rows of a record batch; an error stands for one with a value that Python cannot hold."""
    try:
        yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            yield error
        else:
            for place in range(batch.num_rows):
                yield from _python_rows(batch.slice(place, 1))
