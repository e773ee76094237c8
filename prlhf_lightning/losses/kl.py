"""Importance ratios and estimates of the KL divergence to the reference, from one sample of each token."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
"""How the KL divergence to the reference is estimated from one sample of each token."""

MOST_LOG_RATIO = 20.0
"""Log-ratios are cut to ± this before they are exponentiated: an infinite ratio makes NaN of a gradient of 0."""


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """Return `e^x`, finite with a finite gradient for any finite x; outside of ± 20 it is constant."""
    return log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


def kl_estimates(log_probs: Tensor, reference: Tensor, ratio: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """Return an estimate of KL(π || π_ref) from each token, whose gradient is unbiased, in the shape of the inputs.

    With `d = log π - log π_ref` (http://joschu.net/blog/kl-approx.html) and the importance ratio `ρ = π / π_old`:

    - k1: `ρ d`. Value and gradient are unbiased; a single value may be negative.
    - k2: `ρ d² / 2`. The value is biased, the gradient is not, because `ρ` is held constant.
    - k3: `ρ (e^{-d} - 1 + d)`. Value and gradient are unbiased; never negative.

    All three have the same gradient, `ρ d ∇log π`; they differ in value. Without the ratio in front, k3's gradient is
    that of KL(π_ref || π), and k1's is 0 on average.

    Args:
        log_probs: log π of the sampled tokens, differentiable.
        reference: log π_ref of the same.
        ratio: `π / π_old`, differentiable, where π_old sampled the tokens.
        kind: The estimator.
    """
    gap = log_probs - reference.detach()
    if kind == "k1":
        return ratio * gap.detach()  # the gradient of the gap itself is 0 on average: only noise
    if kind == "k2":
        return ratio.detach() * gap**2 / 2
    gap = gap.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    return ratio * (torch.expm1(-gap) + gap)
