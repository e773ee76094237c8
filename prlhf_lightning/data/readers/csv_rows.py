"""CSV with a header, its columns separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from prlhf_lightning.data.readers.text import Items, Unreadable, lines, refuse_twins
from prlhf_lightning.errors import FeedbackFormatError, Place

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(path: Path, delimiter: str | None = None) -> Items:
    """Read rows under a header; an empty cell is null.

    Args:
        path: The file.
        delimiter: What separates columns; if none is given, that of the usual ones which makes most columns of the
            header, or the one that a first line such as `sep=;` (Excel) names.
    """
    csv.field_size_limit(1 << 30)  # the standard limit of 128 kB is shorter than a long conversation
    rest = (line for _, line in lines(path))
    skipped, top = _header(rest)
    if len(told := top.strip()) == 5 and told.lower().startswith("sep="):
        delimiter, (blank, top) = delimiter or told[-1], _header(rest)
        skipped += 1 + blank
    mark = delimiter or _delimiter_of(top)
    reader = csv.reader(chain([top] * bool(top), rest), strict=True, delimiter=mark)
    start, file = skipped + 1, str(path)
    try:
        header = next((values for values in reader if values), [])
        start = skipped + reader.line_num + 1
        refuse_twins(path, header)
        for values in reader:
            where, start = Place(file, start), skipped + reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                error = FeedbackFormatError(
                    f"has {len(values)} values but the header names {len(header)} columns",
                    f"put values that hold {_DELIMITERS.get(mark, repr(mark))}, quotes or line breaks in double quotes "
                    '(" inside them doubled)',
                    where=where,
                    kind="has not as many values as the header names columns",
                )
                yield where, Unreadable(error, values)
                continue
            # CSV knows no null: an empty cell is one where that is allowed, and "is null" where it is not.
            yield where, {name: value or None for name, value in zip(header, values, strict=True)}
    except csv.Error as broken:
        fix = 'put values in double quotes, with " inside them doubled'
        raise FeedbackFormatError(f"broken CSV ({broken})", fix, where=Place(file, start), kind="broken CSV") from None


def _header(rest: Iterator[str]) -> tuple[int, str]:
    """Return how many blank lines come first, and the line after them, empty at the end of the file."""
    skipped = 0
    for line in rest:
        if line.strip():
            return skipped, line
        skipped += 1
    return skipped, ""


def _delimiter_of(header: str) -> str:
    """Return the mark that makes most columns of a header; the comma where none makes several."""

    def columns(mark: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=mark), []))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=columns)
