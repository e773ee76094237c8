"""Writing with any model, one sequence at a time, by whatever it remembers of what it has read.

For models that can't write in batches of ragged rows: those that remember other states than keys and values, in forms
of their own, and those that transformers' `generate` gives no vectors, or pads wrongly.
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

#: What models call their memory, as an argument and in the output.
_NAMES = ("cache", "past_key_values", "cache_params", "state")
_TRIED = 6  # tokens
# In float32, of a standard deviation of the logits: rounding makes up to 2e-4 (24 layers, large random weights), and
# what is wrong is about one apart. But Zamba2 (of transformers 5.24) reads with a least time step and goes on without,
# which may be a hundredth.
_CLOSE_PADDED, _CLOSE_GOING_ON = 0.02, 0.001
_CLOSE_IN_16_BITS = 0.2


class CachedDecoder:
    """A sequence that is read on.

    Args:
        lm: The model, in evaluation mode.
        memory: Name of its memory; see `cache_of`. Without one the sequence is read anew each time.
    """

    def __init__(self, lm: PreTrainedModel, memory: str | None) -> None:
        self._lm, self._memory = lm, memory
        self._remembered: dict[str, Any] = {}
        self._before: Tensor | None = None
        self._length = 0  # of what is remembered

    @torch.no_grad()
    def read(self, vectors: Tensor) -> Tensor:
        """Read vectors `[L, d]`; return the logits `[V]`, float32, of what comes next."""
        if self._memory is None:
            vectors = vectors if self._before is None else torch.cat([self._before, vectors])
            self._before = vectors
        inputs: dict[str, Any] = {"inputs_embeds": vectors[None], **self._remembered}
        end = self._length + len(vectors)
        if "position_ids" in arguments(self._lm):
            inputs["position_ids"] = torch.arange(self._length, end, device=vectors.device)[None]
        with torch.compiler.set_stance("force_eager"):  # lengths change with each step
            output = self._lm(**inputs, **writing_inputs(self._lm), use_cache=self._memory is not None)
        if self._memory is not None:
            self._remembered, self._length = {self._memory: output[self._memory]}, end
        return output.logits[0, -1].float()  # type: ignore[no-any-return]


@torch.no_grad()
def write(
    lm: PreTrainedModel, sequences: SoftPrompt, sampling: Sampling, ends: Collection[int], never: Sequence[int] = ()
) -> Tokens:
    """Write a completion for each of B sequences, up to the first of the tokens that end one, which is included.

    None of the ids of `never` is written.
    """
    memory = cache_of(lm)
    written: list[list[int]] = []
    for vectors in sequences.unpadded():
        going_on, ids = CachedDecoder(lm, memory), list[int]()
        logits = going_on.read(vectors)
        while True:
            logits[list(never)] = -torch.inf
            token = _draw(logits, sampling)
            ids.append(int(token))
            if ids[-1] in ends or len(ids) == sampling.max_new_tokens:
                break
            logits = going_on.read(lm.get_input_embeddings()(token))
        written.append(ids)
    return Tokens.from_lists(written).to(sequences.mask.device)


@torch.no_grad()
def cache_of(lm: PreTrainedModel) -> str | None:
    """Try on a few tokens by which argument a model goes on from what it has read; None where it does by none."""
    vectors = embed(lm, _some_tokens(lm, 1, _TRIED)).vectors[0]
    truth = lm(inputs_embeds=vectors[None], use_cache=False).logits[0].float()
    for name in _NAMES:
        if name in signature(lm.forward).parameters:
            going_on = CachedDecoder(lm, name)
            try:
                tried = [going_on.read(part) for part in (vectors[:-2], vectors[-2:-1], vectors[-1:])]
            except Exception:  # models fail in ways of their own
                continue
            if _are_close(lm, torch.stack(tried), truth[-3:], _CLOSE_GOING_ON):
                return name
    return None


@torch.no_grad()
def writes_in_batches(lm: PreTrainedModel) -> bool:
    """Try whether transformers' `generate` takes vectors for a model, and padding at a row's start changes nothing."""
    if "inputs_embeds" not in signature(lm.prepare_inputs_for_generation).parameters:
        return False
    tokens = _some_tokens(lm, 2, _TRIED)
    tokens.mask[1, _TRIED // 2 :] = False
    rows = embed(lm, tokens)
    with eval_mode(lm):
        together = lm(**model_inputs(lm, join([rows], align="right")), use_cache=False).logits[:, -1].float()
        alone = [lm(inputs_embeds=row[None], use_cache=False).logits[0, -1].float() for row in rows.unpadded()]
    return _are_close(lm, together, torch.stack(alone), _CLOSE_PADDED)


def _draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the next token `[1]` by its logits `[V]`, as transformers' `generate` draws it."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    warped = TopPLogitsWarper(sampling.top_p)(torch.empty(1, 0), logits[None] / sampling.temperature)
    return torch.multinomial(warped[0].softmax(-1), 1)


def _some_tokens(lm: PreTrainedModel, rows: int, length: int) -> Tokens:
    ids = torch.arange(rows * length, device=lm.device).view(rows, length) % lm.get_input_embeddings().weight.shape[0]
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _are_close(lm: PreTrainedModel, tried: Tensor, truth: Tensor, in_float32: float) -> bool:
    tolerance = in_float32 if lm.dtype == torch.float32 else _CLOSE_IN_16_BITS
    return bool((tried - truth).abs().max() <= tolerance * truth.std())
