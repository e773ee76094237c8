"""Parquet."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prlhf_lightning.data.readers.text import Items, Row, Unreadable, refuse_twins, without_gaps
from prlhf_lightning.errors import FeedbackFormatError, Place


def read_parquet(path: Path) -> Items:
    """Read rows, counted from 1."""
    number, file_name = 0, str(path)
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            refuse_twins(path, file.schema_arrow.names)
            _check_names(path, file)
            for batch in file.iter_batches(batch_size=1024):
                for row in _python_rows(batch):
                    number += 1
                    where = Place(file_name, number)
                    if isinstance(row, Exception):
                        kind = "has a value that cannot be read"
                        error = FeedbackFormatError(f"{kind} ({row})", "mend or drop it", where=where, kind=kind)
                        yield where, Unreadable(error)
                    else:
                        yield where, {name: without_gaps(value) for name, value in row.items()}
            if number != (told_of := file.metadata.num_rows):  # a damaged length reads as fewer rows
                raise FeedbackFormatError(
                    f"is damaged after row {number}: it should have {told_of} rows",
                    "write it again",
                    where=file_name,
                    kind="is damaged",
                )
    except FeedbackFormatError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number}" if number else ""
        told, kind = " ".join(str(error).split()), "is no readable Parquet file"
        raise FeedbackFormatError(f"{kind}{after} ({told})", "write it again", where=file_name, kind=kind) from None


def _check_names(path: Path, file: pyarrow.parquet.ParquetFile) -> None:
    """Compare the columns' names, of which there is no checksum, with the second copy that Arrow writes of them."""
    kept = (file.metadata.metadata or {}).get(b"ARROW:schema")
    try:
        copy = pyarrow.ipc.read_schema(pyarrow.BufferReader(b64decode(kept))).names if kept else []
    except (pyarrow.ArrowException, ValueError):  # the copy is damaged, or of a later version
        return
    # Programs that leave columns out may keep the copy as it was.
    other = [(name, told) for name, told in zip(file.schema_arrow.names, copy, strict=False) if name != told]
    if other and len(copy) == len(file.schema_arrow.names):
        raise FeedbackFormatError(
            f"is damaged: a column is called {other[0][0]!r} in one place and {other[0][1]!r} in another",
            "write it again",
            where=str(path),
            kind="is damaged",
        )


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
