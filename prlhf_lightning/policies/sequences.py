"""Putting segments of ragged rows together, and scoring the tokens of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    joined = SoftPrompt.cat_time(segments)
    order = joined.mask.int().argsort(dim=1, descending=align == "left", stable=True)
    width = int(joined.mask.sum(1).max())
    order = order[:, :width] if align == "left" else order[:, order.shape[1] - width :]
    vectors = joined.vectors.gather(1, order[..., None].expand(-1, -1, joined.vectors.shape[-1]))
    return SoftPrompt(vectors, joined.mask.gather(1, order))


def token_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, vocab_size: int) -> Tensor:
    """Return `log p(target)` of each position without ever holding the logits of all of them.

    Args:
        hidden: `[N, d]` final hidden states of the positions that predict the targets.
        targets: `[N]` int64 token ids.
        head: Maps `[n, d]` to logits `[n, V]`.
        vocab_size: V, to size the chunks.

    Returns:
        `[N]` float32; softmax is taken in float32 whatever the dtype of the logits.
    """
    rows = max(1, _LOGITS_PER_CHUNK // vocab_size)
    # Not by its parameters, of which it has none while FSDP1 has put its weights together.
    if (
        type(head) is nn.Linear
        and not head.weight.requires_grad
        and not (head.bias is not None and head.bias.requires_grad)
    ):
        scores: Tensor = _FrozenHeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head.weight, head.bias, rows
        )
        return scores

    def score(hidden_n: Tensor, targets_n: Tensor) -> Tensor:
        return _of(head(hidden_n).float().log_softmax(-1), targets_n)

    if len(targets) <= rows:
        return score(hidden, targets)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    # Recomputing a chunk's logits in backward is what keeps [N, V] from being stored.
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in chunks])


def _of(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the entries of the targets `[n]` in log-probabilities of everything `[n, V]`."""
    return log_probs.gather(-1, targets[:, None]).squeeze(-1)


class _FrozenHeadLogProbs(torch.autograd.Function):
    """`log p(target)` under a linear head that is not trained.

    The gradient by a hidden state is the upstream scalar times `W[target] - sum_v p_v W_v`. That vector needs nothing
    from upstream, so it is taken in the forward pass, while a chunk's probabilities are at hand: backward needs
    neither the logits nor to compute them again, two products with W in all where recomputation takes three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_gradient = ctx.needs_input_grad[0]
        scores, directions = [], []
        with torch.autocast(device, enabled=False):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for hidden_n, targets_n in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
                logits = nn.functional.linear(hidden_n.to(dtype), weight, bias).float()
                # In place, since a second buffer of this size takes a CPU longer to obtain than to fill.
                log_probs = torch.log_softmax(logits, -1, out=logits)
                scores.append(_of(log_probs, targets_n))
                if wants_gradient:
                    mean = log_probs.exp_().to(dtype) @ weight
                    directions.append((weight[targets_n] - mean).to(hidden.dtype))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(directions))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (grads[0][:, None] * directions).to(directions.dtype), None, None, None, None
