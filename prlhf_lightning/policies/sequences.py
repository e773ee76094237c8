"""Concatenation of padded segments, and log-probabilities of tokens without storing all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prlhf_lightning.types import SoftPrompt

# 16M logits in float32 are 64 MB: small compared to a model, large enough for an efficient matmul.
_LOGITS_PER_CHUNK = 1 << 24


def join(segments: Sequence[SoftPrompt], align: str = "left") -> SoftPrompt:
    """Concatenate the segments of each row and remove the padding between them.

    Args:
        segments: Segments of each row, each `[B, T_i, d]` with its mask.
        align: `left` puts the padding at the end of a row (training), `right` at its start (generation).

    Returns:
        `[B, T, d]` with T the length of the longest row.
    """
    joined = SoftPrompt.cat_time(segments)
    order = joined.mask.int().argsort(dim=1, descending=align == "left", stable=True)
    width = int(joined.mask.sum(1).max())
    order = order[:, :width] if align == "left" else order[:, order.shape[1] - width :]
    vectors = joined.vectors.gather(1, order[..., None].expand(-1, -1, joined.vectors.shape[-1]))
    return SoftPrompt(vectors, joined.mask.gather(1, order))


def token_log_probs(
    hidden: Tensor, targets: Tensor, head: nn.Module, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """Return `log p(target)` of each position; never stores the logits of all positions.

    Args:
        hidden: `[N, d]` last hidden states of the positions that predict the targets.
        targets: `[N]` int64 token ids.
        head: Maps `[n, d]` to logits `[n, V]`.
        vocab_size: V, to size the chunks.
        temperature: Divides the logits.

    Returns:
        `[N]` float32; the softmax is computed in float32 whatever the dtype of the logits.
    """
    rows = max(1, _LOGITS_PER_CHUNK // vocab_size)
    # Do not use `head.parameters()`: it is empty while FSDP1 has flattened the weights.
    if (
        type(head) is nn.Linear
        and not head.weight.requires_grad
        and not (head.bias is not None and head.bias.requires_grad)
    ):
        scores: Tensor = _FrozenHeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head.weight, head.bias, rows, temperature
        )
        return scores

    def score(hidden_n: Tensor, targets_n: Tensor) -> Tensor:
        return _gather((head(hidden_n).float() / temperature).log_softmax(-1), targets_n)

    if len(targets) <= rows:
        return score(hidden, targets)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    # Recompute each chunk's logits in backward, so [N, V] is never stored.
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in chunks])


def _gather(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the entries of log-probabilities `[n, V]` at the targets `[n]`."""
    return log_probs.gather(-1, targets[:, None]).squeeze(-1)


class _FrozenHeadLogProbs(torch.autograd.Function):
    """`log p(target)` under a frozen linear head.

    The gradient with respect to a hidden state is the upstream scalar times `W[target] - sum_v p_v W_v`. This vector
    does not depend on upstream, so the forward pass computes it from the chunk's probabilities. Backward then needs no
    logits: two products with W in total instead of three with recomputation.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, rows: int, temperature: float
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_gradient = ctx.needs_input_grad[0]
        scores, directions = [], []
        with torch.autocast(device, enabled=False):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for hidden_n, targets_n in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
                logits = nn.functional.linear(hidden_n.to(dtype), weight, bias).float()
                if temperature != 1.0:
                    logits /= temperature
                # In place: on a CPU, allocating a second buffer of this size takes longer than filling it.
                log_probs = torch.log_softmax(logits, -1, out=logits)
                scores.append(_gather(log_probs, targets_n))
                if wants_gradient:
                    mean = log_probs.exp_().to(dtype) @ weight
                    directions.append(((weight[targets_n] - mean) / temperature).to(hidden.dtype))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(directions))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (grads[0][:, None] * directions).to(directions.dtype), None, None, None, None, None
