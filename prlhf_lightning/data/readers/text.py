"""UTF-8 text from files, gzipped or not, with the number of the line that each piece starts on."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

from prlhf_lightning.errors import FeedbackFormatError, Place

_CHUNK = 1 << 16  # bytes read at a time where lines mean nothing


def pieces(path: Path, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, or pieces of a given size, after the number of the line that each starts on."""
    line = 1
    try:
        with _open(path) as file:
            for raw in file if size is None else iter(lambda: file.read(size), b""):
                yield line, raw
                line += raw.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        kind = "the gzip data is damaged or cut short here"
        raise FeedbackFormatError(
            f"{kind} ({error})", "copy or compress it again", where=Place(str(path), line), kind=kind
        ) from None
    except OSError as error:
        raise FeedbackFormatError(
            f"cannot be read ({error})", "check the file and who may read it", where=str(path), kind="cannot be read"
        ) from None


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file after their numbers."""
    for number, raw in pieces(path):
        yield number, decoded(path, number, raw)


def decoded(path: Path, number: int, line: bytes) -> str:
    """Return a line, without the byte order mark that the first may begin with."""
    if number == 1:
        _refuse_utf16(path, line)
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        _not_utf8(path, number, error)


def chunks(path: Path) -> Iterator[str]:
    """Yield a file in pieces that do not end where its lines do."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for line, raw in pieces(path, _CHUNK):
        if line == 1:
            _refuse_utf16(path, raw)
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            _not_utf8(path, line + error.object[: error.start].count(b"\n"), error)
        if text:
            yield text
    if decoder.getstate()[0]:
        fix = "save the whole file as UTF-8"
        raise FeedbackFormatError("ends in the middle of a UTF-8 character", fix, where=str(path))


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FeedbackFormatError(
            "is UTF-16, as 'Unicode Text' of Excel",
            "save the file as UTF-8 (in Excel 'CSV UTF-8'), or convert it, as by `iconv -f UTF-16 -t UTF-8`",
            where=Place(str(path), 1),
        )


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> NoReturn:
    raise FeedbackFormatError(
        f"byte 0x{error.object[error.start]:02x} is not UTF-8",
        "save the file as UTF-8 (in Excel 'CSV UTF-8'), or convert it, as by `iconv -f WINDOWS-1252 -t UTF-8` for "
        "Latin-1 and Windows text",
        where=Place(str(path), line),
        kind="is not UTF-8",
    ) from None


Row: TypeAlias = Mapping[str, Any]


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


Items: TypeAlias = Iterator[tuple[Place, Row | Unreadable]]
"""Where a row stands, such as `votes.jsonl:17`, and the row."""


def without_gaps(value: Any) -> Any:
    """Return a nested value of an Arrow table without the keys that are null in it.

    Arrow gives all objects of a column the same keys, so that a message without tool calls has them as null.
    """
    if isinstance(value, dict):
        return {key: without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [without_gaps(inner) for inner in value] if isinstance(value, list) else value


def refuse_twins(path: Path, columns: list[str]) -> None:
    """Refuse two columns of one name, of which only one could be read. Columns without a name are nobody's."""
    for number, name in enumerate(columns):
        if name and name in columns[:number]:
            raise FeedbackFormatError(
                f"column {name!r} stands twice (columns {columns.index(name) + 1} and {number + 1})",
                "rename or remove one of them",
                where=str(path),
                kind="a column stands twice",
            )
