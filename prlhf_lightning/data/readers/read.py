"""The rows of a file of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from prlhf_lightning.data.readers.csv_rows import read_csv
from prlhf_lightning.data.readers.json_rows import read_json, read_jsonl
from prlhf_lightning.data.readers.parquet_rows import read_parquet
from prlhf_lightning.data.readers.text import Items, Row, Unreadable
from prlhf_lightning.errors import FeedbackFormatError, Place

#: How the names of files end that can be read; all but Parquet may have .gz after it.
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(path: str | Path, delimiter: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield every row of a file after where it stands, such as `votes.jsonl.gz:17`.

    Lines are counted from 1; in Parquet files, which have none, rows are. A row of a CSV file or of a JSON array that
    spans several lines is named by its first, and one of an array by its number too, as in `votes.json:1, row 17`.
    Blank lines are skipped.

    Args:
        path: The file.
        delimiter: What separates the columns of a CSV file; found out if none is given.

    Raises:
        FeedbackFormatError: The file is missing, empty, of an unknown kind, damaged or not UTF-8.
    """
    return _refusing(_items(Path(path), delimiter))


def scan_rows(path: str | Path, delimiter: str | None = None) -> Items:
    """Yield what `read_rows` does, but an `Unreadable` where that raises an error, and go on where the format allows.

    Lines of JSON Lines stand alone, so reading goes on after any of them. In other formats it goes on after a row that
    could be told from the next, and ends (`Unreadable.rest`) where damage leaves open where the next begins.
    """
    path = Path(path)
    try:
        yield from _items(path, delimiter)
    except FeedbackFormatError as error:
        yield Place(str(path)), Unreadable(error, rest=True)


def _refusing(items: Items) -> Iterator[tuple[str, Row]]:
    for where, row in items:
        if isinstance(row, Unreadable):
            raise row.error
        yield where, row


def _items(path: Path, delimiter: str | None) -> Items:
    reader = _reader(path, delimiter)
    if not path.exists():
        fix = f"check the path (it is relative to {Path.cwd()})"
        raise FeedbackFormatError("there is no such file", fix, where=str(path))
    if not path.is_file():
        fix = "name the files in it, as one path or a list of paths"
        raise FeedbackFormatError("is a directory", fix, where=str(path))
    return _not_empty(path, reader(path))


def is_readable(path: Path) -> bool:
    """Return whether the name of a file is that of a kind that can be read."""
    return path.name.lower().removesuffix(".gz").endswith(KINDS) and not path.name.lower().endswith(".parquet.gz")


def _reader(path: Path, delimiter: str | None) -> Callable[[Path], Items]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    readers: dict[str, Callable[[Path], Items]] = {
        ".jsonl": read_jsonl,
        ".json": read_json,
        ".csv": partial(read_csv, delimiter=delimiter),
        ".tsv": partial(read_csv, delimiter=delimiter or "\t"),
    }
    if suffixes and suffixes[-1] == ".parquet":
        return read_parquet
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in readers:
        raise FeedbackFormatError(
            "unknown kind of file",
            "the name must end in .jsonl, .json, .csv or .tsv (each may have .gz after it) or .parquet",
            where=str(path),
        )
    return readers[suffixes[-1]]


def _not_empty(path: Path, rows: Items) -> Items:
    empty = True
    for item in rows:
        empty = False
        yield item
    if empty:
        fix = "write at least one row of feedback, or leave the file out"
        raise FeedbackFormatError("has no rows", fix, where=str(path))
