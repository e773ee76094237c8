"""Looking up the reference's log-probs of a batch, and keeping those that had to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prlhf_lightning.reference_cache import ReferenceCache, Values, content_key
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, Tokens


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
        texts, prompts = _rows(batch.user_text) if self.sees_text else [()] * len(batch), _rows(batch.prompt)
        keys = [
            [content_key(*parts) for parts in zip(texts, prompts, _rows(completion), strict=True)]
            for completion in (batch.chosen, batch.rejected)
        ]
        batch = replace(batch, reference_keys=tuple(zip(*keys, strict=True)))
        chosen, rejected = self.cache.get(keys[0]), self.cache.get(keys[1])
        if any(values is None for values in (*chosen, *rejected)):
            return batch
        return replace(batch, reference=PairLogProbs(_pad(chosen, batch.chosen), _pad(rejected, batch.rejected)))

    def keep(self, batch: PreferenceBatch, scored: PairLogProbs) -> None:
        """Keep what was computed for a batch that `attach` could not serve."""
        for column, scores in enumerate((scored.chosen, scored.rejected)):
            tokens, lengths = scores.tokens.cpu().numpy(), scores.lengths.tolist()
            keys = [pair[column] for pair in batch.reference_keys]
            self.cache.put(keys, [row[:length] for row, length in zip(tokens, lengths, strict=True)])


def _rows(tokens: Tokens) -> list[Sequence[int]]:
    return [ids[mask].numpy() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _pad(values: Sequence[Values | None], completion: Tokens) -> LogProbs:
    log_probs = torch.zeros(completion.mask.shape)
    log_probs[completion.mask] = torch.cat([torch.tensor(row) for row in values])
    return LogProbs(log_probs, completion.mask)
