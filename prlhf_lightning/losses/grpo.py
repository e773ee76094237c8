"""GRPO and its relatives: what a token's loss is, and what the sum over tokens is divided by.

`ρ` is the importance ratio `π / π_old`, `A` the advantage.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.kl import KLEstimator
from prlhf_lightning.losses.policy_gradient import PolicyGradientLoss, StepSizes


class ClippedLoss(PolicyGradientLoss):
    """Base class of losses with PPO's clipped objective, `-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)`.

    Source: arXiv:1707.06347, Eq. 7; two ranges as in DAPO (arXiv:2503.14476, Eq. 10); dual clip as in
    arXiv:1912.09729, Eq. 5.

    Args:
        clip_low: How far below 1 a ratio may be while a negative advantage lowers it further.
        clip_high: How far above 1 a ratio may be while a positive advantage raises it further.
        max_ratio: Dual clip: a larger ratio gives a negative advantage no gradient, so that one unlikely token cannot
            take over the step; 3 is usual. None: no limit.
        beta: Weight of the KL divergence to the reference; 0 needs no reference.
        kl: Estimator of the KL divergence. It changes the value that is logged; the gradient is the same for all.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        max_ratio: float | None = None,
        beta: float = 0.0,
        kl: KLEstimator = "k3",
    ) -> None:
        super().__init__(beta, kl)
        name = type(self).__name__
        if not 0 < clip_low <= 1:
            raise ConfigurationError(f"{name}: clip_low is {clip_low}; it must be above 0 and at most 1.")
        if not 0 < clip_high < math.inf:
            raise ConfigurationError(f"{name}: clip_high is {clip_high}; it must be above 0.")
        if max_ratio is not None and not 1 + clip_high <= max_ratio < math.inf:
            raise ConfigurationError(
                f"{name}: max_ratio is {max_ratio}; as a limit beyond the clip range it must be at least "
                f"1 + clip_high = {1 + clip_high:g}."
            )
        self.clip_low, self.clip_high, self.max_ratio = clip_low, clip_high, max_ratio

    def policy_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """Return PPO's clipped loss, in the shape of `ratio`."""
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        if self.max_ratio is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, self.max_ratio * advantages), gain)
        return -gain

    def is_clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Return where the ratio is outside the range on the side to which the advantage pushes it."""
        most = math.inf if self.max_ratio is None else self.max_ratio
        below = (ratio < 1 - self.clip_low) | (ratio > most)
        return (below & (advantages < 0)) | ((ratio > 1 + self.clip_high) & (advantages > 0))


class GRPOLoss(ClippedLoss):
    """Group relative policy optimization (arXiv:2402.03300, Eq. 3): the mean of means over each completion's tokens."""

    def token_weights(self, mask: Tensor) -> Tensor:
        """Return 1 over the length of each completion, `[B, L]`."""
        return (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)

    def denominator(self, sizes: StepSizes) -> float:
        """Return the number of completions."""
        return float(max(sizes.sequences, 1))


class DrGRPOLoss(ClippedLoss):
    """Dr. GRPO (arXiv:2503.20783): divides by a constant, so that a token's weight does not depend on any length.

    With advantages that are not divided by the standard deviation of their group it is the paper's method.
    """

    def denominator(self, sizes: StepSizes) -> float:
        """Return the number of completions times the most tokens that one may have."""
        return float(max(sizes.sequences * sizes.max_length, 1))


class BNPOLoss(ClippedLoss):
    """The mean over all tokens of the optimizer step.

    Other implementations average over each micro-batch, which makes the gradient depend on how a step is split.
    """

    def denominator(self, sizes: StepSizes) -> float:
        """Return the number of tokens."""
        return float(max(sizes.tokens, 1))


class DAPOLoss(ClippedLoss):
    """DAPO (arXiv:2503.14476, Eq. 8): the mean over all tokens of the generation batch; clips less on the upper side.

    A step that trains a part of the generation batch divides by its share: its completions times the mean length.

    Args:
        clip_low: How far below 1 a ratio may be while a negative advantage lowers it further.
        clip_high: How far above 1 a ratio may be while a positive advantage raises it further.
        max_ratio: Dual clip: a larger ratio gives a negative advantage no gradient; 3 is usual. None: no limit.
        beta: Weight of the KL divergence to the reference; 0 needs no reference.
        kl: Estimator of the KL divergence. It changes the value that is logged; the gradient is the same for all.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        max_ratio: float | None = None,
        beta: float = 0.0,
        kl: KLEstimator = "k3",
    ) -> None:
        super().__init__(clip_low, clip_high, max_ratio, beta, kl)

    def denominator(self, sizes: StepSizes) -> float:
        """Return the number of completions times the mean length in the generation batch."""
        return max(sizes.sequences * sizes.mean_length, 1.0)


class GSPOLoss(GRPOLoss):
    """GSPO (arXiv:2507.18071, Eq. 5 and 7): one ratio a completion, the geometric mean of those of its tokens.

    The KL divergence keeps the ratios of tokens, with which its gradient is unbiased.

    Args:
        clip_low: How far below 1 a ratio may be while a negative advantage lowers it further.
        clip_high: How far above 1 a ratio may be while a positive advantage raises it further.
        max_ratio: Dual clip: a larger ratio gives a negative advantage no gradient. None: no limit.
        beta: Weight of the KL divergence to the reference; 0 needs no reference.
        kl: Estimator of the KL divergence. It changes the value that is logged; the gradient is the same for all.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        max_ratio: float | None = None,
        beta: float = 0.0,
        kl: KLEstimator = "k3",
    ) -> None:
        super().__init__(clip_low, clip_high, max_ratio, beta, kl)

    def log_importance(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Return the mean log-ratio of each completion's tokens, `[B, 1]`."""
        return log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


class RLOOLoss(GRPOLoss):
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740): the whole completion is one action.

    The ratio is that of whole completions, clipped as in PPO. The KL divergence is no part of the loss: `β` times the
    log-ratio to the reference is subtracted from the reward. Use it with `leave_one_out_advantages`.

    Args:
        clip_low: How far below 1 a ratio may be while a negative advantage lowers it further.
        clip_high: How far above 1 a ratio may be while a positive advantage raises it further.
        max_ratio: Dual clip: a larger ratio gives a negative advantage no gradient; 3 is usual. None: no limit.
        beta: Weight of the KL divergence to the reference in the reward; 0 needs no reference.
    """

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, max_ratio: float | None = None, beta: float = 0.05
    ) -> None:
        super().__init__(clip_low, clip_high, max_ratio, beta, kl="k1")

    @property
    def kl_weight(self) -> float:
        """0: the KL divergence is in the reward."""
        return 0.0

    def log_importance(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Return the log-ratio of each completion, `[B, 1]`."""
        return log_ratio.sum(1, keepdim=True)

    def shaped_rewards(
        self, rewards: Tensor, old_log_probs: Tensor, reference_log_probs: Tensor | None, mask: Tensor
    ) -> Tensor:
        """Return the rewards minus `β (log π_old(y|x) - log π_ref(y|x))`, `[B]`."""
        if not self.beta or reference_log_probs is None:
            return rewards
        gap = torch.where(mask, old_log_probs - reference_log_probs, 0.0)
        return rewards - self.beta * gap.sum(1).to(rewards.dtype)


class CISPOLoss(PolicyGradientLoss):
    """CISPO (MiniMax-M1, arXiv:2506.13585, Eq. 4): REINFORCE with truncated weights, `-sg(min(ρ, c)) A log π`.

    Every token keeps a gradient, however far its ratio is from 1; only its weight is limited. The mean is that of DAPO.

    Args:
        max_ratio: The limit c of the weights.
        beta: Weight of the KL divergence to the reference; 0 needs no reference.
        kl: Estimator of the KL divergence. It changes the value that is logged; the gradient is the same for all.
    """

    def __init__(self, max_ratio: float = 5.0, beta: float = 0.0, kl: KLEstimator = "k3") -> None:
        super().__init__(beta, kl)
        if not 1 <= max_ratio < math.inf:
            raise ConfigurationError(f"{type(self).__name__}: max_ratio is {max_ratio}; it must be at least 1.")
        self.max_ratio = max_ratio

    def policy_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """Return minus the advantage times the log-prob, weighted by the truncated ratio, `[B, L]`."""
        return -ratio.detach().clamp(max=self.max_ratio) * advantages * log_probs

    def denominator(self, sizes: StepSizes) -> float:
        """Return the number of completions times the mean length in the generation batch."""
        return max(sizes.sequences * sizes.mean_length, 1.0)
