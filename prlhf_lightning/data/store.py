"""Cache of validated and tokenized rows, memory-mapped from disk.

A cache is a folder named by a hash of everything that its content depends on. It is built under another name and
renamed when complete, so a killed build leaves no incomplete cache. Its files are checked against their SHA-256 at
every start; a damaged cache is built again. Deleting the folder is always safe.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import file_digest, sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeAlias, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.columns import UnreadColumns
from prlhf_lightning.data.conversations import Note
from prlhf_lightning.data.privacy import Pseudonyms
from prlhf_lightning.data.records import Columns, FeedbackRecord, TieError, parse_record
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.special_tokens import ControlTokens
from prlhf_lightning.data.splits import SplitBy, text_key
from prlhf_lightning.data.tokenization import (
    Excess,
    FeedbackTokenizer,
    Ids,
    TokenizationSettings,
    TokenizedRecord,
    tokenizer_identity,
)
from prlhf_lightning.errors import FeedbackFormatError
from prlhf_lightning.types import Feedback
from prlhf_lightning.utils.io import flush_to_disk
from prlhf_lightning.utils.progress import counting

Ties: TypeAlias = Literal["error", "drop"]
_T = TypeVar("_T")

_FORMAT = 7  # increase it when the meaning of stored data changes, so older caches are not read
_BATCH = 1000  # rows tokenized and written together
_ROWS, _REPORT, _SUMS = "rows.arrow", "report.json", "sha256.json"
_log = logging.getLogger(__name__)

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "where": pa.string(),
        "user_text_ids": _IDS,
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "prompt_key": pa.int64(),
        "pair_key": pa.int64(),
    }
)


@dataclass
class Noted:
    """How often there was something to tell about a row, the first place where, and what to do about it."""

    count: int
    first: str
    fix: str = ""


@dataclass
class BuildReport:
    """Counts of kept and dropped rows of a split.

    Attributes:
        read: Rows read from the source.
        ties: Rows left out because their completions are equal.
        token_ties: Rows left out because their completions are equal after tokenization or truncation.
        too_long: Rows left out because a field was over its limit.
        user_texts: Kept rows with a text about the user.
        conversations: Kept rows with a conversation as the prompt instead of a plain string.
        excess: For each field, the rows over its limit; truncated or left out as the settings say.
        source: Counts of the source itself, such as raw rows left out by its protocol.
        notes: Remarks on kept rows, with the number and the first of these rows, and the fix.
        unread_columns: The first few columns that are not used.
        digest: SHA-256 of the users and token ids of all kept rows, in order.
    """

    read: int = 0
    ties: int = 0
    token_ties: int = 0
    too_long: int = 0
    user_texts: int = 0
    conversations: int = 0
    excess: dict[str, Excess] = field(default_factory=dict)
    source: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Noted] = field(default_factory=dict)
    unread_columns: list[str] = field(default_factory=list)
    digest: str = ""

    def note(self, note: Note, where: str) -> None:
        """Count a row with a remark."""
        self.notes.setdefault(note.told, Noted(0, where, note.fix)).count += 1

    @property
    def kept(self) -> int:
        """Number of kept rows."""
        return self.read - self.ties - self.token_ties - self.too_long


class TokenizedSplit:
    """One tokenized split of a source, in the cache or in memory. Positions count its rows from 0.

    Attributes:
        report: Counts of kept and dropped rows.
    """

    def __init__(self, rows: datasets.Dataset, report: BuildReport) -> None:
        self._rows, self.report = rows.with_format("arrow"), report

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Open a split of the cache."""
        rows = datasets.Dataset.from_file(str(folder / _ROWS))
        stored = json.loads((folder / _REPORT).read_text())
        excess = {name: Excess(**entry) for name, entry in stored.pop("excess").items()}
        notes = {told: Noted(**entry) for told, entry in stored.pop("notes").items()}
        return cls(rows, BuildReport(**stored, excess=excess, notes=notes))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows in the order of `positions`, each with its position as `record`."""
        rows: list[dict[str, Any]] = self._rows[list(positions)].to_pylist()
        return [{**row, "record": position} for row, position in zip(rows, positions, strict=True)]

    def ids(self, positions: npt.NDArray[np.int64], parts: Sequence[str]) -> list[list[bytes]]:
        """Return the token ids of parts of rows, as bytes of int32, in the order of `positions`.

        Args:
            positions: `[n]`.
            parts: Such as `prompt`, `chosen` and `rejected`.
        """
        table = self._rows[positions.tolist()]
        found = []
        for part in parts:
            column = table[f"{part}_ids"].combine_chunks()
            ids, ends = column.flatten().to_numpy(), (column.offsets.to_numpy() - column.offsets[0].as_py()).tolist()
            found.append([ids[start:end].tobytes() for start, end in pairwise(ends)])
        return found

    @cached_property
    def users(self) -> npt.NDArray[np.int32]:
        """`[N]` index of each row's user in `user_ids`."""
        return np.concatenate([chunk.indices.to_numpy() for chunk in self._encoded_users.chunks])

    @cached_property
    def user_ids(self) -> list[str]:
        """The users of the split, in order of appearance."""
        ids: list[str] = self._encoded_users.chunk(0).dictionary.to_pylist()
        return ids

    @cached_property
    def _encoded_users(self) -> Any:
        return self._rows.data.column("user_id").dictionary_encode().unify_dictionaries()

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[N]` tokens of each row's longer sequence: user text, prompt and the longer completion."""
        parts = ("user_text", "prompt", "chosen", "rejected")  # lengths come from the lists' offsets; reads no tokens
        columns = [pc.list_value_length(self._rows.data.column(f"{part}_ids")).to_numpy() for part in parts]
        user_text, prompt, chosen, rejected = (column.astype(np.int64) for column in columns)
        lengths: npt.NDArray[np.int64] = user_text + prompt + np.maximum(chosen, rejected)
        return lengths

    def keys(self, by: SplitBy) -> npt.NDArray[np.int64]:
        """Return a hash `[N]` of each row's prompt, or of its prompt and completions in any order."""
        keys: npt.NDArray[np.int64] = self._rows.data.column(f"{by}_key").to_numpy()
        return keys


@dataclass
class FeedbackCache:
    """Builds and opens the caches of one tokenizer and one set of settings.

    Attributes:
        root: Folder of the caches.
        tokenizer: The policy's tokenizer.
        settings: Tokenization settings.
        feedback: Kind of the rows; see `parse_record`.
        ties: Handling of rows with equal completions.
        pseudonyms: Replacement of user ids, or None.
    """

    root: Path
    tokenizer: PreTrainedTokenizerBase
    settings: TokenizationSettings
    feedback: Feedback
    ties: Ties
    pseudonyms: Pseudonyms | None = None

    def open(self, source: DataSource, split: Split) -> TokenizedSplit:
        """Return a split of a source; build it if it is not in the cache.

        If the cache cannot be written, the split is built in memory, with a warning.
        """
        folder = self.root / self._key(source, split)
        try:
            if not _is_intact(folder):
                self.root.mkdir(parents=True, exist_ok=True)
                # Processes that start together wait for the first one; the lock ends with its process.
                with FileLock(f"{folder}.lock"):
                    if not _is_intact(folder):
                        if folder.exists():
                            _log.warning("The cache %s is damaged. It is built again.", folder)
                            shutil.rmtree(folder)
                        self._build(source, split, folder)
        except OSError as error:  # no permission, a file instead of a folder, a full disk; not an error of the source
            _log.warning(
                "data.cache_dir is %s, where the tokenized %s split cannot be written (%s). It is held in memory, and "
                "made again at the next start; free space there, or set data.cache_dir (or the variable PRLHF_CACHE) "
                "to a folder that can be written.",
                self.root, split, error,
            )  # fmt: skip
            return self._in_memory(source, split)
        return TokenizedSplit.of_folder(folder)

    def _in_memory(self, source: DataSource, split: Split) -> TokenizedSplit:
        file = io.BytesIO()
        report = self._write(source, split, file)
        self._warn(report, split)
        table = pa.ipc.open_stream(pa.py_buffer(file.getbuffer())).read_all()
        return TokenizedSplit(datasets.Dataset(datasets.table.InMemoryTable(table)), report)

    def _key(self, source: DataSource, split: Split) -> str:
        parts = {
            "format": _FORMAT,
            "source": f"{type(source).__module__}.{type(source).__qualname__}",
            "fingerprint": source.fingerprint(split),
            "columns": dict(source.columns),
            "tokenizer": self._tokenizer_identity,
            "settings": asdict(self.settings),
            "feedback": self.feedback,
            "ties": self.ties,
        }
        if self.pseudonyms is not None:
            parts["pseudonyms"] = self.pseudonyms.fingerprint()
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def _tokenizer_identity(self) -> str:
        return tokenizer_identity(self.tokenizer)

    def _build(self, source: DataSource, split: Split, folder: Path) -> None:
        building = folder.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)  # left by a killed build; the lock excludes a running one
        building.mkdir(mode=0o700)  # its rows contain user ids
        try:
            with (building / _ROWS).open("wb") as file:
                report = self._write(source, split, file)
                flush_to_disk(file)
            _write_json(building / _REPORT, asdict(report))
            _write_json(building / _SUMS, _sums(building, folder.name))
            os.replace(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        self._warn(report, split)

    def _write(self, source: DataSource, split: Split, file: BinaryIO) -> BuildReport:
        tokenize = FeedbackTokenizer(self.tokenizer, self.settings)
        report, digest = BuildReport(excess=tokenize.excess), sha256()
        with (
            pa.ipc.new_stream(file, _SCHEMA) as writer,
            counting(f"Tokenizing the {split} split") as progress,
        ):
            for batch in _batches(self._records(source, split, report)):
                wheres, records = zip(*batch, strict=True)
                rows = []
                for where, record, ids in zip(wheres, records, tokenize(records, wheres), strict=True):
                    if ids is None:
                        report.too_long += 1
                    elif ids.tie:
                        if self.ties == "error":
                            raise tokenize.token_tie(ids, where)
                        report.token_ties += 1
                    else:
                        rows.append((where, record, ids))
                        report.user_texts += len(ids.user_text) > 0
                        report.conversations += not isinstance(record.prompt, str)
                _add_rows(digest, rows)
                writer.write_batch(_record_batch(rows))
                progress.update(progress.task_ids[0], completed=report.read)
            writer.close()
        report.source, report.digest = source.counts(split), digest.hexdigest()
        if not report.kept:
            before = "".join(f". Before that: {count} {what}" for what, count in report.source.items())
            raise FeedbackFormatError(
                f"The {split} split has no usable rows: {report.read} were read and all of them left out "
                f"({report.ties} with equal completions, {report.token_ties} with completions that are equal once "
                f"tokenized or cut, {report.too_long} too long)",
                _mend(report) + before,
                kind="no usable rows",
            )
        return report

    def _records(self, source: DataSource, split: Split, report: BuildReport) -> Iterator[tuple[str, FeedbackRecord]]:
        columns = Columns.from_mapping(source.columns)
        control = ControlTokens(self.tokenizer)
        unread = UnreadColumns(columns.named())
        for where, row in read(source, split):
            report.read += 1
            unread.add(row)
            try:
                record = parse_record(row, where, columns, self.feedback)
            except TieError:
                if self.ties == "error":
                    raise
                report.ties += 1
            else:
                for note in (*record.notes, *control.notes(record)):
                    report.note(note, where)
                if self.pseudonyms is not None:
                    record = replace(record, user_id=self.pseudonyms(record.user_id))
                yield where, record
        report.unread_columns = unread.names

    def _warn(self, report: BuildReport, split: Split) -> None:
        done = "left out" if self.settings.overlong == "drop" else "cut to the limit"
        for name, excess in report.excess.items():
            _log.warning(
                "%d of %d %s rows have a longer '%s' than allowed and were %s (first: %s).",
                excess.count, report.read, split, name, done, excess.first,
            )  # fmt: skip
        for told, found in report.notes.items():
            note = f"{told}; {found.fix}" if found.fix else told
            _log.warning("%d of %d %s rows: %s (first: %s).", found.count, report.read, split, note, found.first)
        if report.ties:
            _log.warning(
                "%d of %d %s rows have equal completions (or no winner) and were left out.",
                report.ties,
                report.read,
                split,
            )
        if report.token_ties:
            _log.warning(
                "%d of %d %s rows have completions that are equal once tokenized and cut to max_completion_length=%d, "
                "and were left out.", report.token_ties, report.read, split, self.settings.max_completion_length,
            )  # fmt: skip


def _is_intact(folder: Path) -> bool:
    """Return whether a cache exists, with unchanged files and the key of its name."""
    try:
        return bool(json.loads((folder / _SUMS).read_text()) == _sums(folder, folder.name))
    except (FileNotFoundError, ValueError):  # no cache, or a damaged checksum file
        return False


def _sums(folder: Path, key: str) -> dict[str, str]:
    """Return the key and the checksums of the files of a folder; the key detects files of another cache."""
    return {"key": key, **{name: _sha256(folder / name) for name in (_ROWS, _REPORT)}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, sha256).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file)
        flush_to_disk(file)


def _mend(report: BuildReport) -> str:
    if not report.token_ties and not report.too_long:
        return "give rows of which one completion is preferred and the other differs"
    return "raise the limits or set overlong to truncate"


def _record_batch(rows: list[tuple[str, FeedbackRecord, TokenizedRecord]]) -> Any:
    prompts, pairs = [], []
    for _, record, _ in rows:
        prompt, completions = text_key(record.prompt), text_key(record.chosen or "") + text_key(record.rejected or "")
        prompts.append(prompt)
        # The same comparison has the same key whichever completion won, so it is never in both splits.
        pairs.append((31 * prompt + completions) % 2**64)
    columns = [
        pa.array([record.user_id for _, record, _ in rows], pa.string()),
        pa.array([where for where, _, _ in rows], pa.string()),
        *(_lists([ids[part] for _, _, ids in rows]) for part in range(4)),
        pa.array(np.array(prompts, dtype=np.uint64).view(np.int64)),
        pa.array(np.array(pairs, dtype=np.uint64).view(np.int64)),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _add_rows(digest: Any, rows: list[tuple[str, FeedbackRecord, TokenizedRecord]]) -> None:
    """Add users and ids to a hash, each after its length, so different rows cannot give the same input."""
    for _, record, ids in rows:
        for part in (record.user_id.encode(), *(ids[number].astype("<i4").tobytes() for number in range(4))):
            digest.update(len(part).to_bytes(8, "little") + part)


def _lists(arrays: list[Ids]) -> Any:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, np.int32), *arrays]))


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
