"""From logits to tokens, each text by its own settings and its own chance."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(logits: Tensor, temperatures: Tensor, top_ps: Tensor, chances: Tensor) -> Tensor:
    """Return the next token of each text, `[B]` int64.

    Args:
        logits: `[B, V]`.
        temperatures: `[B]`; 0 picks the likeliest token, the first of those that are equally likely.
        top_ps: `[B]` share of the probability to draw from: the fewest likeliest tokens that have it (Holtzman et al.
            2020, nucleus sampling).
        chances: `[B]` float64 in [0, 1), one draw for each text.
    """
    tokens = logits.argmax(-1)
    sampled = (temperatures > 0).nonzero()[:, 0]
    if not len(sampled):
        return tokens
    wanted = logits[sampled].double()
    scaled = (wanted - wanted.amax(-1, keepdim=True)) / temperatures[sampled, None].double()
    # In float64: by its rounding alone, a float32 sum over a large vocabulary would move where a draw falls.
    probs, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    below = probs.cumsum(-1) - probs
    kept = (below < top_ps[sampled, None].double()) * probs
    reached = kept.cumsum(-1)
    target = chances[sampled, None] * reached[:, -1:]
    places = torch.searchsorted(reached, target, right=True)
    # At least the first, so that a text whose logits are NaN takes no other text with it.
    last = ((kept > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    tokens[sampled] = order.gather(-1, torch.minimum(places, last))[:, 0]
    return tokens
