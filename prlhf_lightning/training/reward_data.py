"""Data of reward models: all pairs of a split at once, as indices into their distinct texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.batching import share_of
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards import JudgedPairs
from prlhf_lightning.training.judged_pairs import judged_pairs


class RewardDataModule(PreferenceDataModule):
    """A `PreferenceDataModule` whose only training batch is all training pairs.

    With a frozen backbone a pair is three numbers: its user and two texts. So all pairs fit into memory, and settings
    of batches have no effect.

    Ratings and rankings become pairs in their sources (`RatingSource`, `RankingSource`). A thumb (`feedback: thumbs`)
    is a comparison with the user's own threshold: the reward of a text without content, which every user judges. So
    users may be hard or easy to please, and a thumb needs no second text of the same prompt.
    """

    def judged(self, pairs: Any) -> JudgedPairs:
        """Return stored rows as pairs of distinct texts.

        Raises:
            ConfigurationError: The rows are a stream, or demonstrations.
        """
        if not isinstance(pairs, Pairs) or self.feedback == "demonstrations":
            raise ConfigurationError(
                "A reward model with a frozen backbone needs stored pairs or thumbs: set data.streaming: false, and "
                "give rows with 'chosen' and 'rejected', or data.feedback: thumbs."
            )

        nothing = [self._prepared.tokenize.tokenizer.eos_token_id] if self.feedback == "thumbs" else []
        return judged_pairs(pairs, nothing)

    @cache  # noqa: B019 - it lives as long as the data module, which is used once in a process
    def training_pairs(self) -> JudgedPairs:
        """Return the training pairs."""
        return self.judged(self._prepared.division.train)

    def train_dataloader(self) -> Any:
        """Return a loader of one batch: all training pairs.

        Raises:
            ConfigurationError: Several processes share the data.
        """
        if share_of(self.trainer)[1] > 1:
            raise ConfigurationError("A frozen backbone's heads are fitted by one process: set trainer.devices: 1.")
        return _one_batch(self.training_pairs())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: the module moves what it needs."""
        return batch

    def _evaluation_loaders(self, stage: Any) -> list[Any]:
        return [_one_batch(self.judged(pairs)) for pairs in self._prepared.evaluation(stage).values()]


def _one_batch(pairs: JudgedPairs) -> DataLoader[JudgedPairs]:
    return DataLoader([pairs], batch_size=None, collate_fn=_same)  # type: ignore[arg-type]


def _same(batch: JudgedPairs) -> JudgedPairs:
    return batch
