"""Lookup and storage of the reference's log-probs of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.reference_cache import ReferenceCache, Values
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, Tokens
from prlhf_lightning.utils.cache_dir import default_cache_dir
from prlhf_lightning.utils.hashing import content_key


class ReferenceStore:
    """Adds cached reference log-probs to batches.

    Args:
        cache: The cache on disk.
        sees_text: Whether the reference sees the users' text, which is then part of the key.
    """

    def __init__(self, cache: ReferenceCache, sees_text: bool) -> None:
        self.cache = cache
        self.sees_text = sees_text

    def attach(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Return a batch with its keys and, if all its completions are cached, with their log-probs.

        Args:
            batch: B pairs in host memory, so that reading their ids does not synchronize a device.
        """
        nothing = np.empty(0, np.int64)
        texts = _rows(batch.user_text) if self.sees_text else [nothing] * len(batch)
        prompts = _rows(batch.prompt)
        keys = [
            [content_key(*parts) for parts in zip(texts, prompts, _rows(completion), strict=True)]
            for completion in (batch.chosen, batch.rejected)
        ]
        batch = replace(batch, reference_keys=tuple(zip(*keys, strict=True)))
        chosen, rejected = self.cache.get(keys[0]), self.cache.get(keys[1])
        if any(values is None for values in (*chosen, *rejected)):
            return batch
        return replace(batch, reference=PairLogProbs(_pad(chosen, batch.chosen), _pad(rejected, batch.rejected)))

    def keep(self, batch: PreferenceBatch, scored: PairLogProbs) -> PairLogProbs:
        """Store log-probs that were computed for a batch with missing ones.

        Returns:
            The log-probs to use. Cached values take precedence: computed again in another batch, they would differ in
            their last bits, and training would depend on what an interrupted run had scored before.
        """
        columns = [[pair[column] for pair in batch.reference_keys] for column in (0, 1)]
        return PairLogProbs(
            self._settle(columns[0], scored.chosen, batch.chosen),
            self._settle(columns[1], scored.rejected, batch.rejected),
        )

    def _settle(self, keys: Sequence[bytes], scores: LogProbs, completion: Tokens) -> LogProbs:
        rows = zip(scores.tokens.cpu().numpy(), scores.lengths.tolist(), strict=True)
        new: dict[bytes, Values] = {}
        values = [
            new.setdefault(key, row[:length]) if known is None else known
            for key, known, (row, length) in zip(keys, self.cache.get(keys), rows, strict=True)
        ]
        self.cache.put(list(new), list(new.values()))
        # Padded as in `attach`, since sums over another number of padded positions also differ in their last bits.
        return _pad(values, completion.to("cpu")).to(scores.tokens.device)


def open_store(policy: Policy, sees_text: bool, precision: str) -> ReferenceStore | None:
    """Return the store of a policy's reference, or None, with a warning if its folder is not writable.

    It is None if the policy has no identity for its log-probs.

    Args:
        policy: A policy that has been built.
        sees_text: As in `ReferenceStore`.
        precision: The trainer's precision, which affects the last bits.
    """
    identity = policy.reference_identity()
    if identity is None:
        return None
    try:
        cache = ReferenceCache(default_cache_dir() / "reference", {**identity, "precision": precision})
    except ConfigurationError as error:
        rank_zero_warn(
            f"{error} The reference is computed again in each epoch and run, and a resumed run may differ in its "
            "last bits. To train like this without this warning, set model.cache_reference: false."
        )
        return None
    return ReferenceStore(cache, sees_text)


def exchange(store: ReferenceStore | None, trainer: Trainer) -> None:
    """Share computed log-probs between processes; all must call this, also those without a store."""
    if store is not None:
        store.cache.flush()
    trainer.strategy.barrier("reference cache")
    if store is not None:
        store.cache.refresh()


def _rows(tokens: Tokens) -> list[npt.NDArray[Any]]:
    return [ids.numpy() for ids in tokens.unpadded()]


def _pad(values: Sequence[Values | None], completion: Tokens) -> LogProbs:
    log_probs = torch.zeros(completion.mask.shape, dtype=torch.float32)  # for any precision of the trainer
    log_probs[completion.mask] = torch.cat([torch.tensor(row) for row in values])
    return LogProbs(log_probs, completion.mask)
