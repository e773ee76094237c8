"""Packing of prompts with their completions into rows: each prompt is computed once, without padding.

A tree is a prefix (BOS, soft prompt, prompt), its trunk, with n completions, its branches. A row packs several trees:

    trunk  branch 1  branch 2 | trunk  branch 1  branch 2 | ...

A position attends to the trunk of its tree and, causally, to its own branch. Position ids of a branch continue those of
the trunk. So each branch is computed as if it followed its trunk alone, in one pass through the layers. This works with
activation checkpointing, full fine-tuning and sharding.

B trees of n branches each, in R rows of W positions; d the hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prlhf_lightning.types import SoftPrompt

BLOCK = 128  # block size of FlexAttention's mask, for queries and keys


@dataclass(frozen=True)
class PackedPrefixes:
    """Trees packed into rows. An index counts positions within a row.

    Attributes:
        vectors: `[R, W, d]` input embeddings; padding after a row's last tree is zero and attends only to itself.
        positions: `[R, W]` int64 position ids, counted within each sequence.
        trunk: `[R, W]` int64 index where the trunk begins that a position attends to.
        fork: `[R, W]` int64 index where this trunk ends.
        branch: `[R, W]` int64 index where a position's own branch begins; inside a trunk, where the trunk begins.
        rows: `[B]` int64 row of each tree.
        begins: `[B, 1 + n]` int64 index where each trunk and each of its branches begins.
    """

    vectors: Tensor
    positions: Tensor
    trunk: Tensor
    fork: Tensor
    branch: Tensor
    rows: Tensor
    begins: Tensor

    @property
    def may_see(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Mask function of FlexAttention (row, head, query, key): whether a query attends to a key."""
        trunk, fork, branch = self.trunk, self.fork, self.branch

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_trunk = (trunk[row, query] <= key) & (key < fork[row, query])
            return in_trunk | ((branch[row, query] <= key) & (key <= query))

        return may_see

    def dense_mask(self) -> Tensor:
        """Return the attention mask `[R, 1, W, W]`, bool; true where a query (third) attends to a key (last)."""
        rows, width = self.trunk.shape
        row = torch.arange(rows, device=self.trunk.device)[:, None, None, None]
        place = torch.arange(width, device=self.trunk.device)
        return self.may_see(row, row, place[:, None], place)

    def block_mask(self) -> BlockMask:
        """Return the block mask for FlexAttention, which skips blocks that no query attends to.

        It equals torch's `create_block_mask(self.may_see, ...)`, but needs neither W^2 memory nor a compiler. W must be
        a multiple of `BLOCK`.
        """
        rows, width = self.trunk.shape
        first = torch.arange(0, width, BLOCK, device=self.trunk.device)
        after = torch.arange(width, device=self.trunk.device).expand(rows, -1) + 1

        def keys(low: Tensor, high: Tensor) -> Tensor:  # number of keys of [low, high) in each block
            return (high[..., None].clamp(max=first + BLOCK) - low[..., None].clamp(min=first)).clamp(min=0)

        seen = (keys(self.trunk, self.fork) + keys(self.branch, after)).view(rows, 1, -1, BLOCK, len(first))
        full = (seen == BLOCK).all(3)
        partial = (seen > 0).any(3) & ~full

        def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
            return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()

        return BlockMask.from_kv_blocks(
            *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=self.may_see, seq_lengths=(width, width)
        )

    def predicting(self, trees: Tensor, branches: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and indices `[N]` of the positions that predict the tokens at tree, branch, offset `[N]`."""
        # The end of the trunk predicts a branch's first token.
        start = torch.where(offsets > 0, self.begins[trees, branches + 1], self.begins[trees, 1])
        return self.rows[trees], start + offsets - 1


def pack_prefixes(
    trunk: Sequence[SoftPrompt], branches: Sequence[SoftPrompt], trees_in_row: int = 1, multiple: int = 1
) -> PackedPrefixes:
    """Pack trees into rows.

    Args:
        trunk: Segments of the B trunks; each trunk needs at least one real position.
        branches: n batches of B branches.
        trees_in_row: Trees per row.
        multiple: W is rounded up to a multiple of it.
    """
    segments = SoftPrompt.cat_time([*trunk, *branches])
    parts = [SoftPrompt.cat_time(trunk), *branches]
    lengths = torch.stack([part.mask.sum(1) for part in parts], dim=1)
    whole = lengths.sum(1)
    rows = torch.arange(len(whole), device=whole.device) // trees_in_row
    roots = whole.cumsum(0) - whole
    roots = roots - roots[rows * trees_in_row]
    begins = roots[:, None] + lengths.cumsum(1) - lengths
    width = -(-int((roots + whole).max()) // multiple) * multiple

    # One entry per real position, in the order of `segments`.
    part = torch.arange(lengths.numel(), device=whole.device).repeat_interleave(lengths.flatten())
    tree = part // len(parts)
    offset = torch.arange(len(part), device=part.device) - (lengths.flatten().cumsum(0) - lengths.flatten())[part]
    branch = begins.flatten()[part]
    fork = torch.where(part % len(parts) > 0, begins[tree, 1], roots[tree])  # a trunk attends only to itself
    at = (rows[tree], branch + offset)

    shape = (int(rows[-1]) + 1, width)
    alone = torch.arange(width, device=part.device).expand(shape)
    return PackedPrefixes(
        vectors=segments.vectors.new_zeros(*shape, segments.vectors.shape[-1]).index_put(
            at, segments.vectors[segments.mask]
        ),
        positions=torch.zeros_like(alone).index_put(at, fork - roots[tree] + offset),
        trunk=alone.index_put(at, roots[tree]),
        fork=alone.index_put(at, fork),
        branch=alone.index_put(at, branch),
        rows=rows,
        begins=begins,
    )


_NAME = "sparse_or_dense"


def take_block_masks(lm: PreTrainedModel) -> bool:
    """Make a model use FlexAttention for block masks and sdpa for all other masks.

    The mask decides, not a setting: generation would have to change a setting, and recomputation in backward would see
    it changed.

    Returns:
        Whether the model supports it: it must use sdpa and support FlexAttention.
    """
    fits = lm.config._attn_implementation == "sdpa" and bool(lm._supports_flex_attn)
    if fits:
        lm.set_attn_implementation(_NAME)
    return fits


def takes_block_masks(lm: PreTrainedModel, device: torch.device) -> bool:
    """Return whether a model accepts block masks on a device; on a CPU FlexAttention has no backward."""
    return bool(lm.config._attn_implementation == _NAME) and device.type == "cuda"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **how: Any
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(attention_mask, BlockMask):
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
        return output
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for sdpa
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    sparse: tuple[Tensor, Tensor | None] = flex_attention_forward(module, query, key, value, attention_mask, **how)
    return sparse


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
