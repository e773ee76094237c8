"""Detection of a model's capabilities by trial on a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.prefix_sharing import take_block_masks, takes_block_masks
from prlhf_lightning.policies.scoring import Capabilities, arguments, cache_name, embed, model_inputs, score
from prlhf_lightning.types import SoftPrompt, Tokens
from prlhf_lightning.utils.modes import eval_mode


@torch.no_grad()
def is_causal(lm: PreTrainedModel) -> bool:
    """Return whether a model's predictions are independent of later tokens, found by trial."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8]], device=lm.device)
    tokens = Tokens(ids % lm.get_input_embeddings().weight.shape[0], torch.ones_like(ids, dtype=torch.bool))
    with eval_mode(lm):
        logits = lm(**model_inputs(lm, embed(lm, tokens))).logits.float()
    changes = (logits[0] - logits[1]).abs().amax(-1)
    # Relative to the change where the tokens differ, because logits have any scale; equal rows may round differently.
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.03
    return bool(changes[:3].max() <= tolerance * changes[3:].max())


@torch.no_grad()
def find_capabilities(lm: PreTrainedModel) -> Capabilities:
    """Return the shortcuts that reproduce the model's own log-probabilities, found by trial.

    They hold for most architectures. The trial detects models that scale or cap their logits, that cache other states
    than keys and values of all positions, or whose attention does not follow the mask, whatever their class.
    """
    before, completions = _few_tokens(lm, lm.device)
    with eval_mode(lm):
        truth = score(lm, before, completions, Capabilities(head=False, shared_prompt=False))

        def holds(shortcuts: Capabilities) -> bool:
            tolerance = 1e-3 if lm.dtype == torch.float32 else 0.1
            tried = score(lm, before, completions, shortcuts)
            pairs = zip(truth, tried, strict=True)
            return all(torch.allclose(a.tokens, b.tokens, rtol=1e-2, atol=tolerance) for a, b in pairs)

        # A cap shows only on large logits, and those of a few tokens may be small.
        capped = getattr(lm.config.get_text_config(), "final_logit_softcapping", None) is not None
        plain = lm.get_output_embeddings() is not None and lm.base_model is not lm and not capped
        head = plain and holds(Capabilities(head=True, shared_prompt=False))
        full = head and _keeps_keys_and_values(lm, before[0])
        shared = full and holds(Capabilities(head=True, shared_prompt=True))
    return Capabilities(head, shared, trees=full and _takes_masks(lm) and prefix_packing_works(lm, lm.device))


@torch.no_grad()
def prefix_packing_works(lm: PreTrainedModel, device: torch.device) -> bool:
    """Return whether packed trees give the log-probabilities of padded rows on a device, found by trial."""
    before, completions = _few_tokens(lm, device)
    swapped = [SoftPrompt(part.vectors.flip(0), part.mask.flip(0)) for part in before]
    padded = Capabilities(head=True, shared_prompt=False)
    with eval_mode(lm):
        truth = score(lm, before, completions, padded)
        others = score(lm, swapped, completions, padded)
        tried = score(lm, before, completions, replace(padded, trees=True), as_trees=True)
    error, change = (
        torch.cat([(a.tokens - b.tokens)[a.mask] for a, b in zip(truth, results, strict=True)])
        for results in (tried, others)
    )
    # Relative to the effect of another prompt: with random weights, wrong attention changes very little.
    if lm.dtype == torch.float32 and device.type == "cpu":
        return bool(error.abs().max() <= 1e-5 + 1e-3 * change.abs().max())
    # Rounding in bfloat16 moves the log-probs of a trained model by up to 1; attention that ignores mask or positions
    # moves them by more than a fifth of what another prompt does.
    return bool(error.abs().max() <= 0.1 or error.square().mean() <= (change / 8).square().mean())


def _few_tokens(lm: PreTrainedModel, device: torch.device) -> tuple[list[SoftPrompt], list[Tokens]]:
    """Return two prompts and two batches of their completions."""
    ids = torch.arange(24, device=device).view(4, 6) % lm.get_input_embeddings().weight.shape[0]
    lengths = torch.tensor([6, 3, 4, 1], device=device)
    tokens = Tokens(ids, torch.arange(6, device=device) < lengths[:, None])
    before = [embed(lm, Tokens(tokens.ids[:2], tokens.mask[:2]))]
    return before, [Tokens(tokens.ids[2:], tokens.mask[2:]), Tokens(tokens.ids[:2, :3], tokens.mask[:2, :3])]


def _takes_masks(lm: PreTrainedModel) -> bool:
    # Other attention changes masks, depends on the index in the row, or cannot have several sequences in a row.
    follows_mask = lm._supports_attention_backend and lm.config._attn_implementation == "sdpa"
    return follows_mask and "position_ids" in arguments(lm)


def _keeps_keys_and_values(lm: PreTrainedModel, sequence: SoftPrompt) -> bool:
    # Windowed, compressed or recurrent states may agree on a few tokens but not on many.
    cache: Any = getattr(lm.base_model(**model_inputs(lm, sequence), use_cache=True), cache_name(lm), None)
    # A model's own cache class has other states too, which cannot be continued twice (MiniMax).
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


class Packing:
    """Packing for a policy with `packing: true`.

    A model that cannot be packed is scored in padded rows, with a warning.

    Args:
        lm: The model; its attention is changed to accept block masks.
        name: The user's name of the model, for messages.
        shortcuts: The model's capabilities.
    """

    def __init__(self, lm: PreTrainedModel, name: str, shortcuts: Capabilities) -> None:
        self._name = name
        self._tried: set[torch.device] = set()
        self._fits = shortcuts.trees and take_block_masks(lm)
        if not self._fits:
            warnings.warn(
                f"policy.packing: {name!r} is a {type(lm).__name__} whose attention (attn_implementation "
                f"{lm.config._attn_implementation!r}; windows, recurrence, or positions not from position ids) does "
                "not support packed completions; it is scored in padded rows.",
                stacklevel=3,
            )

    def applies(self, lm: PreTrainedModel, device: torch.device) -> bool:
        """Return whether to pack on a device; the first call for a device tries packing on a few tokens.

        Raises:
            ConfigurationError: Packed rows give other log-probabilities than padded rows.
        """
        if not (self._fits and takes_block_masks(lm, device)):
            return False
        if device not in self._tried and not prefix_packing_works(lm, device):
            raise ConfigurationError(
                f"policy.packing: with {self._name!r} on this device ({device}), packed rows give other "
                "log-probabilities than padded rows; set it to false."
            )
        self._tried.add(device)
        return True
