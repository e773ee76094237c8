"""Bayesian logistic regression for many users at once: posterior of codes with linear margins.

B users, each with up to n pairs (`mask` marks real ones), and k whitened dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ITERATIONS = 30  # Newton converges in about six; the bound is for separable data under a wide prior


@dataclass(frozen=True)
class Posterior:
    """Gaussian approximation of each user's posterior.

    Attributes:
        mode: `[B, k]` most probable codes.
        covariance: `[B, k, k]` inverse of the negative log-posterior's Hessian there.
    """

    mode: Tensor
    covariance: Tensor

    @property
    def std(self) -> Tensor:
        """`[B, k]` standard deviation of each dimension: 1 before the first pair."""
        return self.covariance.diagonal(dim1=1, dim2=2).sqrt()


def negative_log_posterior(margins: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return `-sum log σ(Δ) + |z|²/2` of each user, `[B]`: Bradley-Terry with a standard normal prior.

    Args:
        margins: `[B, n]` reward of the chosen minus the rejected completion.
        codes: `[B, k]` whitened codes.
        mask: `[B, n]` bool, true on real pairs.
    """
    return -(F.logsigmoid(margins) * mask).sum(1) + codes.square().sum(1) / 2


def laplace(offsets: Tensor, slopes: Tensor, mask: Tensor) -> Posterior:
    """Return the Laplace approximation for margins `offsets + slopes @ z`, `z ~ N(0, I)`.

    The objective is convex, so Newton's method with backtracking finds the unique mode (Bishop 2006, §4.5).

    Args:
        offsets: `[B, n]` margins at code 0.
        slopes: `[B, n, k]` gradients of the margins by the code.
        mask: `[B, n]` bool, true on real pairs.
    """
    batch, _, dims = slopes.shape
    slopes = slopes * mask[..., None]
    eye = torch.eye(dims, dtype=slopes.dtype, device=slopes.device)
    codes = slopes.new_zeros(batch, dims)

    def margins_at(z: Tensor) -> Tensor:
        return offsets + torch.einsum("bnk,bk->bn", slopes, z)

    def hessian(margins: Tensor) -> Tensor:
        curvature = margins.sigmoid() * (-margins).sigmoid() * mask
        return eye + torch.einsum("bnk,bn,bnl->bkl", slopes, curvature, slopes)

    value = negative_log_posterior(margins_at(codes), codes, mask)
    for _ in range(_ITERATIONS):
        margins = margins_at(codes)
        gradient = codes - torch.einsum("bnk,bn->bk", slopes, (-margins).sigmoid() * mask)
        step = torch.linalg.solve(hessian(margins), gradient[..., None]).squeeze(-1)
        length = slopes.new_ones(batch)
        for _ in range(20):
            tried = codes - length[:, None] * step
            new = negative_log_posterior(margins_at(tried), tried, mask)
            worse = new > value
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        better = new <= value
        codes = torch.where(better[:, None], tried, codes)
        value = torch.where(better, new, value)
        if step.abs().amax() < 1e-6 * (1 + codes.abs().amax()):
            break
    return Posterior(codes, torch.linalg.inv(hessian(margins_at(codes))))
