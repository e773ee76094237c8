"""Which training rows stand together in a batch, stored or streamed, as the settings of a data module say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prlhf_lightning.data.division import Pairs
from prlhf_lightning.data.sampler import UserGroupedBatchSampler
from prlhf_lightning.data.stream import StreamBatchSampler, StreamedRows, StreamOrder
from prlhf_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class TrainingOrder:
    """Makes the samplers of training batches; the fields are arguments of `PreferenceDataModule`."""

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
        # Refuses impossible settings now, not after the data has been tokenised.
        UserGroupedBatchSampler(np.zeros(1, dtype=np.int64), self.batch_size, self.pairs_per_user, self.balance)

    def max_row_tokens(self, sequences: int) -> int | None:
        """Return the most tokens of a batch that is scored as one block, over its rows.

        Args:
            sequences: Sequences that a row is scored as: two of a pair, one of other rows.
        """
        return self.max_tokens_per_batch // sequences if self.max_tokens_per_batch else None

    def batches(
        self, rows: Pairs | StreamedRows, sequences: int, rank: int, world_size: int
    ) -> UserGroupedBatchSampler | StreamBatchSampler:
        """Return the sampler of one process.

        Args:
            rows: The training rows.
            sequences: As in `max_row_tokens`.
            rank: Rank of the process among those that share the data.
            world_size: Number of these processes.
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
                f"balance is {self.balance}; streamed rows come each once an epoch: set balance: 0."
            )
        if self.max_tokens_per_batch is not None:
            raise ConfigurationError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}; it needs the lengths of all rows before "
                "training, which a stream has not: set it to null (bucket_by_length: true works), or streaming: false."
            )
        if self.shuffle_buffer < 1:
            raise ConfigurationError(f"shuffle_buffer is {self.shuffle_buffer}; it must be at least 1 row.")
