"""Importance ratios and estimates of the KL divergence to the reference, from one sample of each token."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
"""How the KL divergence to the reference is estimated from one sample of each token."""

MOST_LOG_RATIO = 20.0
"""Log-ratios are cut to ± this before they are exponentiated: an infinite ratio makes NaN of a gradient of 0."""

MOST_KL_RATIO = 10.0
"""Limit of the importance ratio in front of an estimate of the KL divergence."""


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """Return `e^x`, finite with a finite gradient for any finite x; outside of ± 20 it is constant."""
    return log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


def kl_estimates(log_probs: Tensor, reference: Tensor, ratio: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """Return an estimate of KL(π || π_ref) from each token, whose gradient is unbiased, in the shape of the inputs.

    With `d = log π - log π_ref` (http://joschu.net/blog/kl-approx.html) and the importance ratio `ρ = π / π_old`:

    - k1: `ρ d`. The value is unbiased; a single one may be negative.
    - k2: `ρ d² / 2`. The value is biased, and never negative.
    - k3: `ρ (e^{-d} - 1 + d)`. The value is unbiased, and never negative.

    The gradient is `ρ d ∇log π` for all three: that of `ρ k1` and `ρ k3`, up to a term of k1 that is 0 on average. It
    is unbiased. Without the ratio in front, k3's gradient is that of KL(π_ref || π), and k1's is 0 on average.
    ρ is cut to 10, so that one token that has become much more likely cannot outweigh all others.

    Args:
        log_probs: log π of the sampled tokens, differentiable.
        reference: log π_ref of the same.
        ratio: `π / π_old`, where π_old sampled the tokens; used without its gradient.
        kind: The estimator.
    """
    ratio = ratio.detach().clamp(max=MOST_KL_RATIO)
    gap = log_probs.detach() - reference.detach()
    if kind == "k1":
        value = gap
    elif kind == "k2":
        value = gap**2 / 2
    else:
        bounded = gap.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        value = torch.expm1(-bounded) + bounded
    return ratio * (value + gap * (log_probs - log_probs.detach()))
