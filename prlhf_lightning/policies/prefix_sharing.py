"""Prompts with their completions as trees, many in a row, so that the prompt is computed once and nothing is padded.

A tree is a trunk (BOS, soft prompt, prompt) with n completions as branches. All stand one after another in a row:

    trunk  branch 1  branch 2 | trunk  branch 1  branch 2 | ...

A position sees what is not after it in its own branch, and in the trunk of its tree; a branch's positions are counted
on from the trunk. Hence each branch is computed as if it alone stood after its trunk, and one pass through the layers
does for all: layers may be recomputed in backward, trained in full, or divided among processes.

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

BLOCK = 128  # positions in a block of FlexAttention's mask, for queries and for keys


@dataclass(frozen=True)
class PackedPrefixes:
    """Trees laid out in rows.

    Attributes:
        vectors: `[R, W, d]` input embeddings; places after a row's last tree are zero, and see themselves alone.
        positions: `[R, W]` int64 position in its own sequence of each place.
        trunk: `[R, W]` int64 place in the row at which the trunk that a place sees begins.
        fork: `[R, W]` int64 place at which it ends.
        branch: `[R, W]` int64 place at which a place's own branch (or the trunk, for its own places) begins.
        rows: `[B]` int64 row of each tree.
        begins: `[B, 1 + n]` int64 place in the row at which each trunk and each of its branches begins.
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
        """Whether attention goes from a query's place to a key's, as FlexAttention asks: by row, head, query, key."""
        trunk, fork, branch = self.trunk, self.fork, self.branch

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_trunk = (trunk[row, query] <= key) & (key < fork[row, query])
            return in_trunk | ((branch[row, query] <= key) & (key <= query))

        return may_see

    def dense_mask(self) -> Tensor:
        """Return `[R, 1, W, W]` bool, true where a query (third) may see a key (last)."""
        rows, width = self.trunk.shape
        row = torch.arange(rows, device=self.trunk.device)[:, None, None, None]
        place = torch.arange(width, device=self.trunk.device)
        return self.may_see(row, row, place[:, None], place)

    def block_mask(self) -> BlockMask:
        """Return the mask for FlexAttention, of blocks of which those that no query sees are never computed.

        It equals torch's `create_block_mask(self.may_see, ...)`, but needs neither W^2 memory nor a compiler. W must be
        a multiple of `BLOCK`.
        """
        rows, width = self.trunk.shape
        first = torch.arange(0, width, BLOCK, device=self.trunk.device)
        after = torch.arange(width, device=self.trunk.device).expand(rows, -1) + 1

        def keys(low: Tensor, high: Tensor) -> Tensor:  # how many of [low, high) lie in each block
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
        """Return rows and places, `[N]` each, that predict tokens, each named by tree, branch and offset, `[N]`."""
        # A branch's first token is predicted at the end of the trunk.
        start = torch.where(offsets > 0, self.begins[trees, branches + 1], self.begins[trees, 1])
        return self.rows[trees], start + offsets - 1


def pack_prefixes(
    trunk: Sequence[SoftPrompt], branches: Sequence[SoftPrompt], trees_in_row: int = 1, multiple: int = 1
) -> PackedPrefixes:
    """Lay out trees.

    Args:
        trunk: Segments of the B trunks; at least one position of each must be real.
        branches: n batches of B branches.
        trees_in_row: Trees in a row.
        multiple: W is a multiple of it.
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

    # Of each real position, in the order in which they stand in `segments`.
    part = torch.arange(lengths.numel(), device=whole.device).repeat_interleave(lengths.flatten())
    tree = part // len(parts)
    offset = torch.arange(len(part), device=part.device) - (lengths.flatten().cumsum(0) - lengths.flatten())[part]
    branch = begins.flatten()[part]
    fork = torch.where(part % len(parts) > 0, begins[tree, 1], roots[tree])  # a trunk sees nothing but itself
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
