"""Putting segments of ragged rows together, and scoring the tokens of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prlhf_lightning.types import SoftPrompt

# 16M logits in float32 are 64 MB: small beside a model, large enough to keep the matmul efficient.
_LOGITS_PER_CHUNK = 1 << 24


def join(segments: Sequence[SoftPrompt], align: str = "left") -> SoftPrompt:
    """Concatenate the real positions of each row's segments and close the gaps between them.

    Args:
        segments: Parts of each row, each `[B, T_i, d]` with its mask.
        align: `left` leaves the padding at the end of a row (training), `right` at its start (generation).

    Returns:
        `[B, T, d]` with T the longest row.
    """
    joined = SoftPrompt.side_by_side(segments)
    order = joined.mask.int().argsort(dim=1, descending=align == "left", stable=True)
    width = int(joined.mask.sum(1).max())
    order = order[:, :width] if align == "left" else order[:, order.shape[1] - width :]
    vectors = joined.vectors.gather(1, order[..., None].expand(-1, -1, joined.vectors.shape[-1]))
    return SoftPrompt(vectors, joined.mask.gather(1, order))


def token_log_probs(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
    """Return `log p(target)` of each position without ever holding the logits of all of them.

    Args:
        hidden: `[N, d]` final hidden states of the positions that predict the targets.
        targets: `[N]` int64 token ids.
        head: Maps `[n, d]` to logits `[n, V]`.
        vocab_size: V, to size the chunks.

    Returns:
        `[N]` float32; softmax is taken in float32 whatever the dtype of the logits.
    """

    def score(hidden_n: Tensor, targets_n: Tensor) -> Tensor:
        logits = head(hidden_n).float()
        return logits.gather(-1, targets_n[:, None]).squeeze(-1) - logits.logsumexp(-1)

    rows = max(1, _LOGITS_PER_CHUNK // vocab_size)
    if len(targets) <= rows:
        return score(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    # Recomputing a chunk's logits in backward is what keeps [N, V] from being stored.
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in chunks])  # type: ignore[misc]
