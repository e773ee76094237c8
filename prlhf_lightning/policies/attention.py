"""Attention that takes FlexAttention's masks beside those of sdpa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sparse_or_dense"


def take_block_masks(lm: PreTrainedModel) -> bool:
    """Have a model take block masks where it is given one, and otherwise do what it does under sdpa.

    By the mask and not by a setting, which writing would have to change, and which layers that are recomputed in
    backward would find changed.

    Returns:
        Whether it can: not where it uses no sdpa, or FlexAttention doesn't fit it.
    """
    fits = lm.config._attn_implementation == "sdpa" and bool(lm._supports_flex_attn)
    if fits:
        lm.set_attn_implementation(_NAME)
    return fits


def takes_block_masks(lm: PreTrainedModel, device: torch.device) -> bool:
    """Whether block masks can be given to a model that computes on a device: a CPU has no backward for them."""
    return bool(lm.config._attn_implementation == _NAME) and device.type == "cuda"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **how: Any
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(attention_mask, BlockMask):
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
        return output
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast has sdpa do
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    sparse: tuple[Tensor, Tensor | None] = flex_attention_forward(module, query, key, value, attention_mask, **how)
    return sparse


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
