"""CSV with a header."""

from __future__ import annotations

import csv
from pathlib import Path

from prlhf_lightning.data.readers.items import Items, Unreadable, refuse_twins
from prlhf_lightning.data.readers.text import lines
from prlhf_lightning.errors import FeedbackFormatError


def read_csv(path: Path) -> Items:
    """Read rows under a header; an empty cell is null."""
    csv.field_size_limit(1 << 30)  # the standard limit of 128 kB is shorter than a long conversation
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    start = 1
    try:
        header = next((values for values in reader if values), [])
        start = reader.line_num + 1
        refuse_twins(path, header)
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


def _refuse_other_separators(path: Path, header: list[str]) -> None:
    """Refuse a file of which commas make one column, and another usual separator several."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and header[0].count(mark) > 1:
            raise FeedbackFormatError(f"{path}:1: the columns are separated by {name}; save it with commas instead.")
