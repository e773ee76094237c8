"""The command `data convert`: feedback of any source as Parquet files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prlhf_lightning.cli.data_check import the_source
from prlhf_lightning.data.conversations import EXTRAS, plain_text
from prlhf_lightning.data.problems import Problem
from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Columns, FeedbackRecord, Text, parse_record
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.data.sources.files import Paths
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.types import Feedback
from prlhf_lightning.utils.io import (
    all_or_none,
    atomic_writer,
    check_output,
    check_output_folder,
    flush_to_disk,
    not_left_empty,
)
from prlhf_lightning.utils.progress import counted

# Maximum number of rows and characters in memory before a write.
_GROUP_ROWS, _GROUP_CHARACTERS = 10_000, 1 << 25
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_NAMED = 20  # listed columns


def convert(
    output: Path,
    train: Paths | None = None,
    validation: Paths | None = None,
    test: Paths | None = None,
    columns: dict[str, str] | None = None,
    source: DataSource | None = None,
    feedback_type: Feedback = "pairs",
    on_error: Literal["stop", "report"] = "stop",
    overwrite: bool = False,
) -> None:
    """Write feedback as one Parquet file per split with columns user_id, prompt, chosen, rejected and user_text.

    Thumbs have completion and label in place of chosen and rejected.

    Every row is checked. By default the first bad row stops the conversion and nothing is written. With `--on_error
    report` bad rows go to `<split>.rejected.jsonl`, each with the reason, and the others are converted; the command
    exits with 1 if a file could not be read to its end.

    Args:
        output: Folder for `train.parquet`, `validation.parquet` and `test.parquet`.
        train: Training file or files: JSON Lines, JSON, CSV (each also gzipped) or Parquet.
        validation: Validation file or files.
        test: Test file or files.
        columns: Mapping of fields to column names, such as `{user_id: worker}`.
        source: A source instead of files, as for `fit --data.source`.
        feedback_type: Kind of rows: pairs, thumbs (KTOLoss, ...) or demonstrations (SFTLoss).
        on_error: Whether the first bad row stops the conversion, or bad rows are reported.
        overwrite: Whether existing files of these names are replaced.
    """
    with not_left_empty(output):
        check_output_folder(output, "output")
        chosen = the_source(train, validation, test, columns, source)
        splits = [split for split in SPLITS if split in chosen.splits()]
        for split in splits:
            for name in (f"{split}.parquet", f"{split}.rejected.jsonl"):
                check_output(output / name, "output")
                if not overwrite and (output / name).exists():
                    raise ConfigurationError(f"output: {output / name} exists already; add `--overwrite true`.")
        written = convert_source(chosen, output, feedback_type, on_error)
    for split, counts in written.items():
        print(counts.described(split, output))
    sys.exit(1 if any(counts.unread for counts in written.values()) else 0)


@dataclass
class Conversion:
    """Result of the conversion of a split.

    Attributes:
        written: Number of rows in the Parquet file.
        rejected: Number of rows in the file of rejected rows.
        unread: Positions at which reading stopped early; the number of further rows is unknown.
        left_out: Numbers of rows that the source left out by its protocol, by reason.
        ignored: The first few unknown columns.
    """

    written: int = 0
    rejected: int = 0
    unread: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)

    def described(self, split: Split, folder: Path) -> str:
        """Return the summary for the console."""
        rows = f"{self.written + self.rejected:,} rows in = {self.written:,} written + {self.rejected:,} rejected"
        lines = [f"{folder / split}.parquet: {rows}"]
        lines += [f"  {count:,} {what}" for what, count in self.left_out.items()]
        if self.ignored:
            more = ", ..." if len(self.ignored) == _NAMED else ""
            lines.append(f"  columns not converted: {', '.join(map(repr, self.ignored))}{more}")
        if self.rejected or self.unread:
            lines.append(f"  reasons: {folder / split}.rejected.jsonl")
        lines += [f"  NOT READ TO ITS END: {where}; the number of further rows is unknown" for where in self.unread]
        return "\n".join(lines)


def convert_source(
    source: DataSource, folder: Path, feedback: Feedback = "pairs", on_error: Literal["stop", "report"] = "stop"
) -> dict[Split, Conversion]:
    """Write all splits of a source to a folder; see `convert`. A file appears when all are complete.

    Raises:
        FeedbackFormatError: A row is bad and `on_error` is `stop`, or a split has no good row.
        CheckpointWriteError: The files cannot be written.
    """
    splits = [split for split in SPLITS if split in source.splits()]
    done = {}
    names = [folder / f"{split}{end}" for split in splits for end in (".parquet", ".rejected.jsonl")]
    with all_or_none(names), ExitStack() as files:
        for split in splits:
            good = files.enter_context(atomic_writer(folder / f"{split}.parquet"))
            bad = None
            if on_error == "report":
                bad = files.enter_context(atomic_writer(folder / f"{split}.rejected.jsonl"))
            done[split] = _converted(source, split, feedback, good, bad)
            for file in (good, bad):
                if file is not None:
                    flush_to_disk(file)  # before any of them is renamed
    for split, counts in done.items():
        if not counts.rejected and not counts.unread:
            (folder / f"{split}.rejected.jsonl").unlink(missing_ok=True)  # empty, or of an earlier conversion
    return done


def _converted(
    source: DataSource, split: Split, feedback: Feedback, good: BinaryIO, bad: BinaryIO | None
) -> Conversion:
    columns = Columns.from_mapping(source.columns)
    known = {getattr(columns, name) for name in _columns(feedback)}
    counts = Conversion()
    first: FeedbackFormatError | None = None
    with _Writer(good, feedback) as writer:
        for where, row in counted(source.scan(split), f"Converting the {split} split"):
            try:
                if isinstance(row, Unreadable):
                    raise row.error
                writer.add(parse_record(row, where, columns, feedback), where)
            except FeedbackFormatError as error:
                if bad is None:
                    raise
                first = first or error
                problem = Problem.of(split, where, error)
                bad.write(_rejection(problem, error.kind, row))
                if isinstance(row, Unreadable) and row.rest:
                    counts.unread.append(problem.place)
                else:
                    counts.rejected += 1
            else:
                if len(counts.ignored) < _NAMED:
                    counts.ignored.update(dict.fromkeys(name for name in map(str, row) if name not in known))
    counts.written, counts.left_out = writer.written, source.counts(split)
    if not counts.written:
        raise FeedbackFormatError(
            f"The {split} split has no good row, so there is nothing to write ({counts.rejected:,} were read and "
            f"rejected). The first error: {first or 'the source has no rows.'}"
        )
    return counts


class _Writer:
    """Writes records in row groups, with at most one group in memory.

    A Parquet column has one type, so the first record decides between texts and conversations.
    """

    def __init__(self, file: BinaryIO, feedback: Feedback) -> None:
        self._file = file
        self._columns = _columns(feedback)
        self._parquet: pq.ParquetWriter | None = None
        self._group: list[FeedbackRecord] = []
        self._characters = 0
        self._first = ("", False)
        self.written = 0

    def add(self, record: FeedbackRecord, where: str) -> None:
        _refuse_tools(record, where)
        is_text = isinstance(record.prompt, str)
        if self._parquet is None:
            self._first = (where, is_text)
            others = {"user_id": pa.string(), "label": pa.bool_(), "user_text": pa.string()}
            text = pa.string() if is_text else _MESSAGES
            self._schema = pa.schema({name: others.get(name, text) for name in self._columns})
            self._parquet = pq.ParquetWriter(self._file, self._schema, compression="zstd", write_page_checksum=True)
        elif is_text != self._first[1]:
            kinds = ("a text", "a conversation")
            here, there = kinds if is_text else reversed(kinds)
            raise FeedbackFormatError(
                f"is {here}, where {self._first[0]} has {there}",
                "a Parquet column has one type, so convert the two kinds apart, to two folders, and name both files in "
                "training",
                field="prompt",
                where=where,
                kind=f"is {here}, where the first row has {there}",
            )
        self._group.append(record)
        self.written += 1
        self._characters += sum(map(_length, (record.prompt, record.chosen, record.rejected, record.user_text)))
        if len(self._group) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush(self._parquet)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._parquet is None:
            return
        try:
            if kind is None:
                self._flush(self._parquet)
                self._parquet.close()
        finally:
            self._parquet.is_open = False  # or it would try, when it is forgotten, to end a file that is given up

    def _flush(self, parquet: pq.ParquetWriter) -> None:
        if self._group:
            columns = zip(*map(_values, self._group), strict=True)
            arrays = [pa.array(values, column.type) for values, column in zip(columns, self._schema, strict=True)]
            parquet.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._group, self._characters = [], 0


def _columns(feedback: Feedback) -> tuple[str, ...]:
    return (
        "user_id",
        "prompt",
        *(("completion", "label") if feedback == "thumbs" else ("chosen", "rejected")),
        "user_text",
    )


def _values(record: FeedbackRecord) -> tuple[Any, ...]:
    """Return the values of a record in the order of `_columns`."""
    up = record.chosen is not None
    judged = (record.chosen if up else record.rejected, up) if record.thumb else (record.chosen, record.rejected)
    return (record.user_id, record.prompt, *judged, record.user_text)


def _refuse_tools(record: FeedbackRecord, where: str) -> None:
    """Refuse tools and tool calls, which the columns cannot hold."""
    texts = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    held = [
        (field_name, name)
        for field_name, text in texts.items()
        for message in (text if isinstance(text, list) else ())
        for name in EXTRAS
        if name in message
    ]
    for field_name, name in [("tools", "tools")] * bool(record.tools) + held:
        raise FeedbackFormatError(
            f"holds {name}, which these columns have no place for",
            "train on the file as it is, or drop the row here",
            field=field_name,
            where=where,
        )


def _length(text: Text | None) -> int:
    return len(plain_text(text))


def _rejection(problem: Problem, kind: str, row: Mapping[str, Any] | Unreadable) -> bytes:
    """Return the JSON line of a rejected row, with the row itself as far as JSON can hold it."""
    is_rest = isinstance(row, Unreadable) and row.rest
    told = {
        "file": problem.file,
        "line": problem.line,
        "row_number": problem.row_number,
        "kind": kind,
        "field": problem.field,
        "problem": problem.problem,
        "fix": problem.fix,
        "rest_unread": is_rest,
    }
    raw = row.raw if isinstance(row, Unreadable) else row
    try:
        line = json.dumps({**told, "row": raw}, default=repr)
    except (RecursionError, ValueError, TypeError):  # too deep, a number too long, keys that are not strings
        line = json.dumps({**told, "row": None, "row_left_out": "it cannot be written as JSON"})
    return line.encode() + b"\n"
