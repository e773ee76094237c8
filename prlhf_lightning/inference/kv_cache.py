"""KV caches of running sequences, which join and leave at any step: batched, or one per sequence.

R rows, S positions of the longest row, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from prlhf_lightning.policies.continuation import CachedDecoder, cache_of
from prlhf_lightning.policies.scoring import cache_name, embed, model_inputs, writing_inputs
from prlhf_lightning.types import SoftPrompt, Tokens


class BatchedKVCache:
    """Keys and values of R sequences, padded at the start so that all end at the same position.

    Position ids start at a row's own first token, so padding has no effect.

    Args:
        lm: The model, in evaluation mode, which `keeps_keys_and_values`.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm
        self._inputs = writing_inputs(lm)
        if "logits_to_keep" in signature(lm.forward).parameters:
            self._inputs["logits_to_keep"] = 1  # the last position only: all would be [R, S, V]
        self._cache, self._mask = DynamicCache(), torch.zeros(0, 0, dtype=torch.bool, device=lm.device)

    def __len__(self) -> int:
        return len(self._mask)

    def append(self, sequences: SoftPrompt, of: Sequence[int] | None = None) -> Tensor:
        """Add rows at the end and return their next logits.

        Args:
            sequences: `[n, L, d]` embedded prompts, padded at the start. Each is computed once.
            of: The sequence of each of m new rows; by default, there is one row for each.

        Returns:
            `[m, V]` float32 logits of the next token of the new rows.
        """
        cache = DynamicCache()
        mask, logits = sequences.mask, self._forward(sequences, sequences.mask, cache)
        if of is not None and len(of) != len(mask):
            index = torch.tensor(of, device=mask.device)
            mask, logits = mask[index], logits[index]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
        width, new = self._mask.shape[1], mask.shape[1]
        common = max(width, new)
        if len(self):
            for old, added in zip(self._cache.layers, cache.layers, strict=True):
                old.keys = torch.cat([_pad(old.keys, common), _pad(added.keys, common)])
                old.values = torch.cat([_pad(old.values, common), _pad(added.values, common)])
            self._mask = torch.cat([pad(self._mask, (common - width, 0)), pad(mask, (common - new, 0))])
        else:
            self._cache, self._mask = cache, mask
        return logits

    def advance(self, tokens: Tensor) -> Tensor:
        """Add a token `[R]` to each row and return the next logits `[R, V]`, float32."""
        ids = tokens[:, None]
        self._mask = pad(self._mask, (0, 1), value=True)
        step = embed(self._lm, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
        return self._forward(step, self._mask, self._cache)

    def keep(self, rows: Iterable[int]) -> None:
        """Drop all other rows, and positions that are padding in all remaining rows."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self._mask.device)
        if not len(index):
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            return
        mask = self._mask[index]
        start = int(mask.any(0).int().argmax())
        self._mask = mask[:, start:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[index, :, start:], layer.values[index, :, start:]

    def _forward(self, vectors: SoftPrompt, mask: Tensor, cache: DynamicCache) -> Tensor:
        past = mask.shape[1] - vectors.vectors.shape[1]
        inputs = model_inputs(self._lm, SoftPrompt(vectors.vectors, mask), past=past)
        with torch.compiler.set_stance("force_eager"):  # lengths change with each step
            output = self._lm(**inputs, **{cache_name(self._lm): cache}, use_cache=True, **self._inputs)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]


class SeparateKVCaches:
    """R sequences of a model with states other than keys and values (such as Mamba), computed one by one.

    Args:
        lm: The model, in evaluation mode.
        memory: Name of the argument for its state; see `cache_of`.
    """

    def __init__(self, lm: PreTrainedModel, memory: str | None) -> None:
        self._lm, self._memory = lm, memory
        self._rows: list[CachedDecoder] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, sequences: SoftPrompt, of: Sequence[int] | None = None) -> Tensor:
        """Add rows; see `BatchedKVCache.append`. Here each row computes its sequence."""
        prompts = list(sequences.unpadded())
        read = [prompts[number] for number in (range(len(prompts)) if of is None else of)]
        new = [CachedDecoder(self._lm, self._memory) for _ in read]
        self._rows += new
        return torch.stack([row.read(vectors) for row, vectors in zip(new, read, strict=True)])

    def advance(self, tokens: Tensor) -> Tensor:
        """Add a token `[R]` to each row; see `BatchedKVCache.advance`."""
        steps = self._lm.get_input_embeddings()(tokens[:, None])
        return torch.stack([row.read(vectors) for row, vectors in zip(self._rows, steps, strict=True)])

    def keep(self, rows: Iterable[int]) -> None:
        """Drop all other rows."""
        self._rows = [self._rows[row] for row in rows]


def make_kv_cache(lm: PreTrainedModel) -> Callable[[], BatchedKVCache | SeparateKVCaches]:
    """Return a factory of empty caches for a model, chosen by a trial run."""
    if keeps_keys_and_values(lm):
        return partial(BatchedKVCache, lm)
    return partial(SeparateKVCaches, lm, cache_of(lm))


@torch.no_grad()
def keeps_keys_and_values(lm: PreTrainedModel) -> bool:
    """Return whether a model caches keys and values of all positions, tested on two tokens."""
    tokens = embed(lm, Tokens.from_lists([[0, 0]]).to(lm.device))
    cache = DynamicCache()
    with suppress(Exception):  # models with other states raise various errors
        lm(**model_inputs(lm, tokens), **{cache_name(lm): cache}, **writing_inputs(lm), use_cache=True)
    kept = [type(layer) is DynamicLayer and layer.get_seq_length() == 2 for layer in cache.layers]
    return bool(kept) and all(kept)


def _pad(states: Tensor, width: int) -> Tensor:
    """Pad keys or values `[n, heads, S, size]` at the start."""
    return pad(states, (0, 0, width - states.shape[2], 0))
