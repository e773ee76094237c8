"""Training order of stored or streamed rows: its settings, its samplers, and its record in checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.holdout import Pairs, SplitConfig
from prlhf_lightning.data.sampling import UserGroupedBatchSampler
from prlhf_lightning.data.store import TokenizedSplit
from prlhf_lightning.data.streaming import StreamBatchSampler, StreamedRows, StreamOrder
from prlhf_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class TrainingOrder:
    """Settings of the training order; creates batch samplers. The fields are arguments of `PreferenceDataModule`."""

    batch_size: int
    pairs_per_user: int
    balance: float
    bucket_by_length: bool
    max_tokens_per_batch: int | None
    seed: int
    streaming: bool
    shuffle_buffer: int

    def __post_init__(self) -> None:
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 2:
            raise ConfigurationError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}; a pair has at least 2 tokens."
            )
        if self.streaming:
            self._check_streaming()
        # Rejects invalid settings now instead of after tokenization.
        UserGroupedBatchSampler(np.zeros(1, dtype=np.int64), self.batch_size, self.pairs_per_user, self.balance)

    def max_row_tokens(self, sequences: int) -> int | None:
        """Return the token budget of a batch for one sequence per row; None without a budget.

        Args:
            sequences: Sequences scored per row: two for a pair, one for other rows.
        """
        return self.max_tokens_per_batch // sequences if self.max_tokens_per_batch else None

    def batches(
        self, rows: Pairs | StreamedRows, sequences: int, rank: int, world_size: int
    ) -> UserGroupedBatchSampler | StreamBatchSampler:
        """Return the batch sampler of one process.

        Args:
            rows: The training rows.
            sequences: As in `max_row_tokens`.
            rank: Data-parallel rank of the process.
            world_size: Number of data-parallel processes.
        """
        if isinstance(rows, StreamedRows):
            return StreamBatchSampler(
                StreamOrder(
                    len(rows),
                    self.batch_size,
                    self.pairs_per_user,
                    self.bucket_by_length,
                    self.seed,
                    self.shuffle_buffer,
                    rank,
                    world_size,
                )
            )
        max_tokens = self.max_row_tokens(sequences)
        return UserGroupedBatchSampler(
            rows.split.users[rows.positions],
            self.batch_size,
            self.pairs_per_user,
            self.balance,
            self.seed,
            rank,
            world_size,
            lengths=rows.lengths if self.bucket_by_length or max_tokens else None,
            max_tokens=max_tokens,
        )

    def _check_streaming(self) -> None:
        if self.balance:
            raise ConfigurationError(
                f"balance is {self.balance}; streamed rows come once per epoch each: set balance: 0."
            )
        if self.max_tokens_per_batch is not None:
            raise ConfigurationError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}; it needs the lengths of all rows before "
                "training, unknown in a stream: set it to null (bucket_by_length: true works), or streaming: false."
            )
        if self.shuffle_buffer < 1:
            raise ConfigurationError(f"shuffle_buffer is {self.shuffle_buffer}; it must be at least 1 row.")


_Array = npt.NDArray[np.int64]
#: Names, for messages, of the settings that determine the batches of an epoch.
_NAMES = {
    "world_size": "the number of processes",
    "accumulate": "trainer.accumulate_grad_batches",
    **{field.name: f"data.{field.name}" for field in (*fields(TrainingOrder), *fields(SplitConfig))},
}


def record(
    order: TrainingOrder,
    hold_out: SplitConfig,
    rows: Pairs | StreamedRows,
    sequences: int,
    world_size: int,
    accumulate: int,
) -> dict[str, Any]:
    """Return the settings and data that determine the training order, for a checkpoint.

    Args:
        order: Settings of the batches.
        hold_out: Settings of the split.
        rows: The training rows.
        sequences: Sequences scored per row.
        world_size: Number of processes that share the rows.
        accumulate: Batches per process and optimizer step.
    """
    settings = {**asdict(hold_out), **asdict(order), "world_size": world_size, "accumulate": accumulate}
    if not order.streaming:
        del settings["shuffle_buffer"]
    found = {"settings": settings, "sequences": sequences, "rows": len(rows), "data": _digest(rows)}
    # A stream's texts are unknown until they are read.
    return found if isinstance(rows, StreamedRows) else {**found, "texts": rows.split.report.digest}


def differences(kept: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ between two records of the training order, each with both values."""
    before, now = kept["settings"], here["settings"]
    return [
        f"{_NAMES.get(name, name)} was {before[name]!r} and is {now[name]!r}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def has_other_texts(kept: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether the rows of two records differ in their token ids; False if a record has no digest of them."""
    return "texts" in kept and "texts" in here and kept["texts"] != here["texts"]


def hold_out_of(kept: Mapping[str, Any]) -> SplitConfig:
    """Return the split settings of a record."""
    return SplitConfig(**{one.name: kept["settings"][one.name] for one in fields(SplitConfig)})


def trained_rows(kept: Mapping[str, Any], then: Pairs, epoch: int, batch: int) -> _Array:
    """Return the positions `[n]` in the split of the rows already trained on in an epoch.

    Args:
        kept: The record of a checkpoint.
        then: The training rows of its run.
        epoch: The epoch.
        batch: Number of batches per process already trained in it.
    """
    settings = {"shuffle_buffer": 1, **kept["settings"]}
    order = TrainingOrder(**{one.name: settings[one.name] for one in fields(TrainingOrder)})
    sampler = order.batches(then, kept["sequences"], 0, settings["world_size"])
    assert isinstance(sampler, UserGroupedBatchSampler)
    earlier = earlier_rows(kept, epoch)
    leave_out(sampler, then, epoch, earlier)
    return np.concatenate([earlier, *(then.positions[step] for step in sampler.steps(epoch)[:batch])])


def earlier_rows(kept: Mapping[str, Any], epoch: int) -> _Array:
    """Return the rows `[n]` that a record's run skipped in an epoch, because an earlier run had trained on them."""
    found = kept.get("left_out")
    rows: _Array = found["rows"].numpy() if found and found["epoch"] == epoch else np.empty(0, dtype=np.int64)
    return rows


def leave_out(sampler: UserGroupedBatchSampler, rows: Pairs, epoch: int, done: _Array) -> None:
    """Make a sampler skip rows in an epoch; `done` are their positions in the split of `rows`."""
    if len(done):
        places = np.searchsorted(rows.positions, done).clip(max=len(rows) - 1)
        sampler.leave_out(epoch, places[rows.positions[places] == done])


def _digest(rows: Pairs | StreamedRows) -> str:
    """Return a hash of the training rows' split: its users and lengths, in order."""
    digest = hashlib.sha256()
    if isinstance(rows, StreamedRows):
        digest.update(f"{len(rows)} {rows.vocabulary.digest()}".encode())
    else:
        _add_split(digest, rows.split)
    return digest.hexdigest()


def _add_split(digest: Any, split: TokenizedSplit) -> None:
    for user_id in split.user_ids:
        digest.update(user_id.encode() + b"\0")
    for part in (split.users, split.lengths):
        digest.update(np.ascontiguousarray(part).tobytes())
