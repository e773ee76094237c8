"""Generation with any model, one sequence at a time, with any kind of cache.

For models that cannot generate in padded batches: those whose cache is not keys and values, and those for which
transformers' `generate` accepts no input vectors or pads wrongly.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import TopPLogitsWarper

from prlhf_lightning.policies.base import Sampling
from prlhf_lightning.policies.scoring import arguments, embed, model_inputs, writing_inputs
from prlhf_lightning.policies.sequences import join
from prlhf_lightning.types import SoftPrompt, Tokens
from prlhf_lightning.utils.modes import eval_mode

#: Names of a model's cache, as an argument and in the output.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
_TRIAL_LENGTH = 6  # tokens
# Tolerances relative to the standard deviation of the logits. In float32, rounding errors reach 2e-4 (24 layers, large
# random weights); wrong logits differ by about 1. But Zamba2 (transformers 5.24) limits the time step when it reads a
# prompt and not when it continues, which may change logits by 0.01.
_PADDED_TOLERANCE, _CACHED_TOLERANCE = 0.02, 0.001
_TOLERANCE_16_BITS = 0.2


class CachedDecoder:
    """Decoder of one sequence that keeps a model's cache between calls.

    Args:
        lm: The model, in evaluation mode.
        memory: Name of its cache; see `cache_of`. With None, each call computes the whole sequence again.
    """

    def __init__(self, lm: PreTrainedModel, memory: str | None) -> None:
        self._lm, self._memory = lm, memory
        self._cache: dict[str, Any] = {}
        self._before: Tensor | None = None
        self._length = 0  # cached positions

    @torch.no_grad()
    def read(self, vectors: Tensor) -> Tensor:
        """Append vectors `[L, d]` to the sequence; return the next token's logits `[V]`, float32."""
        if self._memory is None:
            vectors = vectors if self._before is None else torch.cat([self._before, vectors])
            self._before = vectors
        inputs: dict[str, Any] = {"inputs_embeds": vectors[None], **self._cache}
        end = self._length + len(vectors)
        if "position_ids" in arguments(self._lm):
            inputs["position_ids"] = torch.arange(self._length, end, device=vectors.device)[None]
        with torch.compiler.set_stance("force_eager"):  # lengths change with each step
            output = self._lm(**inputs, **writing_inputs(self._lm), use_cache=self._memory is not None)
        if self._memory is not None:
            self._cache, self._length = {self._memory: output[self._memory]}, end
        return output.logits[0, -1].float()  # type: ignore[no-any-return]


@torch.no_grad()
def write(
    lm: PreTrainedModel, sequences: SoftPrompt, sampling: Sampling, ends: Collection[int], never: Sequence[int] = ()
) -> Tokens:
    """Generate a completion for each of B sequences, up to and including its first token of `ends`.

    It never generates the ids of `never`.
    """
    memory = cache_of(lm)
    written: list[list[int]] = []
    for vectors in sequences.unpadded():
        decoder, ids = CachedDecoder(lm, memory), list[int]()
        logits = decoder.read(vectors)
        while True:
            logits[list(never)] = -torch.inf
            token = _draw(logits, sampling)
            ids.append(int(token))
            if ids[-1] in ends or len(ids) == sampling.max_new_tokens:
                break
            logits = decoder.read(lm.get_input_embeddings()(token))
        written.append(ids)
    return Tokens.from_lists(written).to(sequences.mask.device)


@torch.no_grad()
def cache_of(lm: PreTrainedModel) -> str | None:
    """Return the name of a model's cache argument, found by trial on a few tokens; None if no cache works."""
    vectors = embed(lm, _trial_tokens(lm, 1, _TRIAL_LENGTH)).vectors[0]
    truth = lm(inputs_embeds=vectors[None], use_cache=False).logits[0].float()
    for name in _CACHE_NAMES:
        if name in signature(lm.forward).parameters:
            decoder = CachedDecoder(lm, name)
            try:
                tried = [decoder.read(part) for part in (vectors[:-2], vectors[-2:-1], vectors[-1:])]
            except Exception:  # models raise any kind of error here
                continue
            if _are_close(lm, torch.stack(tried), truth[-3:], _CACHED_TOLERANCE):
                return name
    return None


@torch.no_grad()
def writes_in_batches(lm: PreTrainedModel) -> bool:
    """Return whether `generate` of transformers accepts vectors and left padding changes nothing, found by trial."""
    if "inputs_embeds" not in signature(lm.prepare_inputs_for_generation).parameters:
        return False
    tokens = _trial_tokens(lm, 2, _TRIAL_LENGTH)
    tokens.mask[1, _TRIAL_LENGTH // 2 :] = False
    rows = embed(lm, tokens)
    with eval_mode(lm):
        together = lm(**model_inputs(lm, join([rows], align="right")), use_cache=False).logits[:, -1].float()
        alone = [lm(inputs_embeds=row[None], use_cache=False).logits[0, -1].float() for row in rows.unpadded()]
    return _are_close(lm, together, torch.stack(alone), _PADDED_TOLERANCE)


def _draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sample the next token `[1]` from its logits `[V]`, as `generate` of transformers does."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    warped = TopPLogitsWarper(sampling.top_p)(torch.empty(1, 0), logits[None] / sampling.temperature)
    return torch.multinomial(warped[0].softmax(-1), 1)


def _trial_tokens(lm: PreTrainedModel, rows: int, length: int) -> Tokens:
    ids = torch.arange(rows * length, device=lm.device).view(rows, length) % lm.get_input_embeddings().weight.shape[0]
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _are_close(lm: PreTrainedModel, tried: Tensor, truth: Tensor, in_float32: float) -> bool:
    tolerance = in_float32 if lm.dtype == torch.float32 else _TOLERANCE_16_BITS
    return bool((tried - truth).abs().max() <= tolerance * truth.std())
