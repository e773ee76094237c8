"""Streaming of training rows, validated and tokenized on the fly, for data sets larger than disk or memory.

The rows of a source are read in order, in blocks of about `shuffle_buffer`. Within a block, `UserGroupedBatchSampler`
shuffles and groups them by user, as it does for a stored data set; its draw depends on (seed, epoch, block). It needs
only the users and the lengths of the texts, which are known before tokenization. So every process and worker computes
the same order of each block, and validates and tokenizes only its own batches.

To resume in the middle of an epoch, the earlier rows are read and skipped, without validation or tokenization.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias
from weakref import finalize

import numpy as np
from torch.utils.data import Dataset, Sampler, get_worker_info

from prlhf_lightning.data.records import Columns, FeedbackRecord, TieError, parse_record
from prlhf_lightning.data.sampling import UserGroupedBatchSampler
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.special_tokens import ControlTokens
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import FeedbackFormatError, PRLHFError
from prlhf_lightning.types import Feedback

Place: TypeAlias = tuple[int, int]
"""An epoch, and the index of a batch in it."""
RawRow: TypeAlias = tuple[int, str, Mapping[str, Any]]
"""The number of a row in its source, its location, and its columns."""
_log = logging.getLogger(__name__)


class StreamedRows:
    """The training rows of a source, in the source's order.

    Attributes:
        vocabulary: The users of the rows.

    Args:
        source: Source of the rows.
        vocabulary: The users of the rows.
        held_out: Users whose rows are skipped.
        size: Expected number of rows of the vocabulary's users; another number is an error.
        split: The split to read.
    """

    def __init__(
        self,
        source: DataSource,
        vocabulary: UserVocabulary,
        held_out: frozenset[str],
        size: int,
        split: Split = "train",
    ) -> None:
        self.source, self.vocabulary, self.split = source, vocabulary, split
        self.columns = Columns.from_mapping(source.columns)
        self._held_out, self._size = held_out, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Generator[RawRow, None, None]:
        count = 0
        for number, (where, row) in enumerate(read(self.source, self.split)):
            user_id = row.get(self.columns.user_id)
            if not isinstance(user_id, str) or user_id not in self.vocabulary:
                if isinstance(user_id, str) and user_id in self._held_out:
                    continue
                raise _changed("names a user who was not there when users were counted", where, "user_id")
            count += 1
            if count > self._size:
                raise _changed(f"the {self.split} split has more than the {self._size:,} rows that were counted", where)
            yield number, where, row
        if count < self._size:
            problem = f"The {self.split} split ended after {count:,} of the {self._size:,} rows that were counted"
            raise _changed(problem)

    def where(self, record: int) -> str:
        """Return the location of a row by its number in the source; reads the source up to it."""
        return next(islice(read(self.source, self.split), record, None))[0]


def _changed(problem: str, where: str | None = None, field: str | None = None) -> FeedbackFormatError:
    """Return the error about rows that are not those that were counted."""
    fix = (
        "leave the data as they are while they are trained on, or, if you gave a users_file, count anew (leave it out)"
    )
    return FeedbackFormatError(problem, fix, where=where, field=field)


@dataclass(frozen=True)
class StreamOrder:
    """Order of a stream: assigns rows to batches, as a function of these settings and of (epoch, block).

    A step is a global batch of `batch_size * world_size` rows. All steps are full except the last of an epoch, whose
    rows are distributed as in `UserGroupedBatchSampler`.

    Attributes:
        rows: Number of rows per epoch.
        batch_size: Rows per batch and process.
        pairs_per_user: Most rows of one user placed together.
        bucket_by_length: Batch rows of similar length together.
        seed: Seed of the order.
        shuffle_buffer: Rows of a block, rounded down to whole steps (at least one).
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel processes.
    """

    rows: int
    batch_size: int
    pairs_per_user: int
    bucket_by_length: bool
    seed: int
    shuffle_buffer: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Return the number of batches per epoch, the same on every rank."""
        return -(-self.rows // self._step)

    @property
    def _step(self) -> int:
        return self.batch_size * self.world_size

    def block(self, number: int) -> range:
        """Return the steps of a step's block."""
        full = self.rows // self._step
        number = max(0, min(number, full - 1))  # the last step, if not full, belongs to the block before it
        size = max(1, self.shuffle_buffer // self._step)
        first = number - number % size
        return range(first, first + size if first + size < full else len(self))

    def rows_of(self, steps: range) -> range:
        """Return the rows of the stream in steps."""
        return range(steps.start * self._step, min(steps.stop * self._step, self.rows))

    def pairs_per_rank(self, steps: slice) -> float:
        """Return the number of rows in the batches of some steps of an epoch, averaged over the ranks."""
        sizes = (len(self.rows_of(range(step, step + 1))) for step in range(*steps.indices(len(self))))
        return sum(max(1.0, size / self.world_size) for size in sizes)

    def lay_out(self, epoch: int, steps: range, users: Sequence[int], lengths: Sequence[int] | None) -> list[list[int]]:
        """Return, for each step of a block, the indices in the block of this rank's rows.

        Args:
            epoch: The epoch.
            steps: The block.
            users: `[N]` user of each row of the block.
            lengths: `[N]` length of each row of the block, if rows are bucketed.
        """
        full = len(users) // self._step * self._step
        draw = epoch * len(self) + steps.start
        return [
            *self._drawn(draw, users[:full], lengths[:full] if lengths else None, first=0),
            *self._drawn(draw, users[full:], lengths[full:] if lengths else None, first=full),
        ]

    def _drawn(self, draw: int, users: Sequence[int], lengths: Sequence[int] | None, first: int) -> Iterator[list[int]]:
        """Yield this rank's batches of consecutive rows of a block, from index `first` on."""
        if not len(users):
            return
        sampler = UserGroupedBatchSampler(
            np.array(users),
            self.batch_size,
            self.pairs_per_user,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            lengths=np.array(lengths) if lengths is not None else None,
        )
        sampler.set_epoch(draw)
        for batch in sampler:
            yield [first + place for place in batch]


class StreamBatchSampler(Sampler[list[Place]]):
    """Yields (epoch, index) of each batch of an epoch; `FeedbackStream` finds its rows.

    Args:
        order: The order of the stream.
    """

    def __init__(self, order: StreamOrder) -> None:
        self.order = order
        self._epoch, self._start = 0, 0

    @property
    def sampler(self) -> StreamBatchSampler:
        """Return self: Lightning looks for `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch to yield next, and its first batch."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Place]]:
        # Read epoch and start now: Lightning may set the next ones before the first batch is drawn.
        epoch = self._epoch
        return ([(epoch, number)] for number in range(self._start, len(self)))

    def pairs_per_rank(self, epoch: int, steps: slice) -> float:
        """Return the number of pairs in the batches of some steps of an epoch, averaged over the ranks."""
        return self.order.pairs_per_rank(steps)


class FeedbackStream(Dataset[dict[str, Any]]):
    """Builds the batches of a stream. Requests must ascend; any other order reads the stream again from its start.

    Rows left out by `ties` or the tokenization settings are missing from their batch. A batch that would be empty gets
    the next row of its block instead, so no process lacks a batch that the others have.

    Args:
        rows: The rows.
        order: Order of the stream.
        tokenize: Tokenizer of records.
        feedback: Required kind of rows.
        drop_ties: Whether to drop rows with equal completions; otherwise they are an error.
    """

    def __init__(
        self, rows: StreamedRows, order: StreamOrder, tokenize: FeedbackTokenizer, feedback: Feedback, drop_ties: bool
    ) -> None:
        self._rows, self._order, self._tokenize = rows, order, tokenize
        self._feedback, self._drop_ties = feedback, drop_ties
        self._control = ControlTokens(tokenize.tokenizer)
        self._epoch = -1
        self._reader: Iterator[RawRow] = iter(())
        self._closing: finalize[Any, Any] | None = None
        self._read = 0  # rows read by the reader
        self._steps = range(0)  # steps of the current block
        self._block: list[RawRow] = []
        self._batches: list[list[int]] = []
        self._left_out: Counter[str] = Counter()

    def __getitems__(self, places: Sequence[Place]) -> list[dict[str, Any]] | PRLHFError:
        """Return the rows of one batch; `places` has one entry. A worker returns an error and does not raise it."""
        (place,) = places
        try:
            return self._rows_of(*place)
        except PRLHFError as error:
            if get_worker_info() is None:
                raise
            return error

    def _rows_of(self, epoch: int, number: int) -> list[dict[str, Any]]:
        steps = self._order.block(number)
        if (epoch, steps) != (self._epoch, self._steps):
            self._open(epoch, steps)
        batch = number - steps.start
        return self._tokenized(self._batches[batch]) or self._replacement(batch)

    def _open(self, epoch: int, steps: range) -> None:
        """Skip to a block, read it and assign its rows to batches."""
        wanted = self._order.rows_of(steps)
        if epoch != self._epoch or wanted.start < self._read:
            if self._closing is not None:
                self._closing()
            self._reader = reader = iter(self._rows)
            # A generator left open at interpreter exit would warn, because its globals are already gone.
            self._closing = finalize(self, reader.close)
            self._epoch, self._read = epoch, 0
        self._block = []  # free the old block before reading the next one
        for _ in islice(self._reader, wanted.start - self._read):
            pass
        self._block = list(islice(self._reader, len(wanted)))
        self._steps, self._read = steps, wanted.stop
        if self._read == self._order.rows:
            next(self._reader, None)  # raises if there are more rows
        columns = self._rows.columns
        users = self._rows.vocabulary.rows([row[columns.user_id] for _, _, row in self._block]).tolist()
        lengths = [_length(row, columns) for _, _, row in self._block] if self._order.bucket_by_length else None
        self._batches = self._order.lay_out(epoch, steps, users, lengths)

    def _replacement(self, batch: int) -> list[dict[str, Any]]:
        """Return a usable row of the block for a batch whose rows were all left out."""
        for places in (*self._batches[batch + 1 :], *self._batches):
            for place in places:
                if row := self._tokenized([place]):
                    return row
        first, last = self._block[0][1], self._block[-1][1]
        raise FeedbackFormatError(
            "none of these rows can be used: all were left out, having equal completions or too many tokens",
            "raise the limits, or set overlong to truncate",
            where=f"{first} to {last}",
        )

    def _tokenized(self, places: Sequence[int]) -> list[dict[str, Any]]:
        records: list[tuple[int, str, FeedbackRecord]] = []
        for number, where, row in (self._block[place] for place in places):
            try:
                record = parse_record(row, where, self._rows.columns, self._feedback)
                records.append((number, where, record))
                for note in (*record.notes, *self._control.notes(record)):
                    self._report(f"are worth a look: {note}", where)
            except TieError:
                if not self._drop_ties:
                    raise
                self._report("have equal completions and are left out", where)
        numbers, wheres, parsed = zip(*records, strict=True) if records else ((), (), ())
        before = {name: excess.count for name, excess in self._tokenize.excess.items()}
        rows = []
        for number, where, record, ids in zip(numbers, wheres, parsed, self._tokenize(parsed, wheres), strict=True):
            if ids is None:
                continue
            if ids.tie:
                if not self._drop_ties:
                    raise self._tokenize.token_tie(ids, where)
                self._report("have completions that are equal once tokenized and cut, and are left out", where)
                continue
            parts = {f"{name}_ids": part for name, part in ids._asdict().items()}
            rows.append({"user_id": record.user_id, "record": number, **parts})
        done = "left out" if self._tokenize.settings.overlong == "drop" else "cut to the limit"
        for name, excess in self._tokenize.excess.items():
            if more := excess.count - before.get(name, 0):
                self._report(f"have a longer '{name}' than allowed and are {done}", wheres[-1], more)
        return rows

    def _report(self, what: str, where: str, more: int = 1) -> None:
        """Warn of rows that are changed or left out, at the first, tenth, hundredth, ... row."""
        before = self._left_out[what]
        self._left_out[what] = now = before + more
        if not before or len(str(now)) > len(str(before)):
            _log.warning("%d rows read so far by this process %s (the last at or before %s).", now, what, where)


def _length(row: Mapping[str, Any], columns: Columns) -> int:
    """Return the approximate length of a row in characters; the row is not validated yet."""
    fields = (columns.user_text, columns.prompt, columns.chosen, columns.rejected, columns.completion)
    text, prompt, chosen, rejected, completion = (len(str(row.get(column) or "")) for column in fields)
    return text + prompt + max(chosen, rejected, completion)
