"""Looking up the reference's log-probs of a batch, and keeping those that had to be computed."""

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
from prlhf_lightning.training.reference_cache import ReferenceCache, Values, content_key
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, Tokens
from prlhf_lightning.utils.cache_dir import default_cache_dir


class ReferenceStore:
    """Gives batches the reference's log-probs where they are known.

    Args:
        cache: Where they are kept.
        sees_text: Whether the reference sees the users' text, which is then part of the key.
    """

    def __init__(self, cache: ReferenceCache, sees_text: bool) -> None:
        self.cache = cache
        self.sees_text = sees_text

    def attach(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Return a batch with its keys and, if all its completions are known, with their log-probs.

        Args:
            batch: B pairs in the host's memory, so that reading their ids does not wait for a device.
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
        """Keep what was computed for a batch that `attach` could not serve.

        Returns:
            The log-probs to use. What was known of a completion stands: computed anew, in another batch, it differs in
            its last bits, and then training would depend on what an interrupted run had scored before.
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
        # Laid out as `attach` does, since sums over another number of padded places differ in their last bits as well.
        return _pad(values, completion.to("cpu")).to(scores.tokens.device)


def open_store(policy: Policy, sees_text: bool, precision: str) -> ReferenceStore | None:
    """Return the store of a policy's reference; None if there can be none, with a warning if it can't be written.

    There can be none where the policy cannot tell what decides its log-probs.

    Args:
        policy: A policy that has been built.
        sees_text: As in `ReferenceStore`.
        precision: The trainer's, which decides the last bits.
    """
    identity = policy.reference_identity()
    if identity is None:
        return None
    try:
        cache = ReferenceCache(default_cache_dir() / "reference", {**identity, "precision": precision})
    except ConfigurationError as error:
        rank_zero_warn(
            f"{error} The reference is computed anew in each epoch and run, and a run that is broken off may go on "
            "with other last bits. To train so without this warning, set model.cache_reference: false."
        )
        return None
    return ReferenceStore(cache, sees_text)


def exchange(store: ReferenceStore | None, trainer: Trainer) -> None:
    """Let every process know what the others computed; all must call this, those without a store as well."""
    if store is not None:
        store.cache.flush()
    trainer.strategy.barrier("reference cache")
    if store is not None:
        store.cache.refresh()


def _rows(tokens: Tokens) -> list[npt.NDArray[Any]]:
    return [ids.numpy() for ids in tokens.unpadded()]


def _pad(values: Sequence[Values | None], completion: Tokens) -> LogProbs:
    log_probs = torch.zeros(completion.mask.shape, dtype=torch.float32)  # whatever the trainer's precision is
    log_probs[completion.mask] = torch.cat([torch.tensor(row) for row in values])
    return LogProbs(log_probs, completion.mask)
