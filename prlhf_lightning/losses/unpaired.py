"""Losses for unpaired feedback: one completion per row, liked (thumbs up) or disliked (thumbs down) by its user.

A liked completion is stored as the chosen one, a disliked one as the rejected one. The other side of the row is empty,
and its reward is NaN.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import PreferenceLoss
from prlhf_lightning.losses.running import RunningShiftLoss
from prlhf_lightning.types import Feedback, PairLogProbs


def kto_loss(reward: Tensor, up: Tensor, reference_point: Tensor | float) -> Tensor:
    """`1 - σ(r - z)` for a thumbs-up, `1 - σ(z - r)` for a thumbs-down: KTO (arXiv:2402.01306, L_KTO with λ_y = 1).

    Args:
        reward: `[B]` rewards `r = β [log π(y|x) - log π_ref(y|x)]`.
        up: `[B]` bool, true for a thumbs-up.
        reference_point: `z = β z_0`.
    """
    distance = reward - reference_point
    return torch.where(up, F.sigmoid(-distance), F.sigmoid(distance))


def bco_unpaired_loss(reward: Tensor, up: Tensor, shift: Tensor | float) -> Tensor:
    """`-log σ(r - δ)` for a thumbs-up, `-log σ(-(r - δ))` for a thumbs-down: BCO (arXiv:2404.04656).

    Args:
        reward: `[B]` rewards `r = β [log π(y|x) - log π_ref(y|x)]`.
        up: `[B]` bool, true for a thumbs-up.
        shift: δ, the mean reward; the classifier's threshold.
    """
    distance = reward - shift
    return -torch.where(up, F.logsigmoid(distance), F.logsigmoid(-distance))


class UnpairedLoss(PreferenceLoss):
    """Base class of losses of one labeled completion per row; subclasses implement `unpaired_loss`.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of a liked completion, added to its row.
    """

    feedback: ClassVar[Feedback] = "thumbs"

    @abstractmethod
    def unpaired_loss(self, reward: Tensor, up: Tensor) -> Tensor:
        """Return the loss of each row, `[B]`.

        Args:
            reward: `[B]` reward of each row's completion.
            up: `[B]` bool, true for a liked completion.
        """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `unpaired_loss` of each row, `[B]`."""
        chosen, rejected = super().rewards(policy, reference)
        up = policy.chosen.mask.any(-1)
        return self.unpaired_loss(torch.where(up, chosen, rejected), up)

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards `[B]` of liked and of disliked completions, NaN on the side a row lacks."""
        chosen, rejected = super().rewards(policy, reference)
        up = policy.chosen.mask.any(-1)
        return chosen.masked_fill(~up, math.nan), rejected.masked_fill(up, math.nan)


class KTOLoss(UnpairedLoss, RunningShiftLoss):
    """Kahneman-Tversky optimization (arXiv:2402.01306) of unpaired feedback.

    The reference point z_0 is the KL divergence of the policy from the reference. As in the paper, it is estimated from
    completions of other prompts of the batch: the mean of their log-ratios, clamped at 0. Unlike in the paper, it is
    a running mean (see `RunningShiftLoss`; `shift` is z_0 before clamping), and each batch uses the z_0 of the earlier
    batches. So a row's loss does not depend on the other rows of its batch, and small batches do not make z_0 noisy.
    The user and the generic term use the same z_0, the mean over both. Each batch costs one more forward pass of policy
    and reference, without gradient, and needs two rows or more.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        desirable_weight: Weight of rows with a thumbs-up (the paper's λ_D).
        undesirable_weight: Weight of rows with a thumbs-down (λ_U). If one kind is much rarer, give it more weight, so
            that both kinds have about the same total weight.
        window: Number of recent rows, over all processes, in the running mean z_0.
        sft_weight: Weight of the negative log-likelihood per token of a liked completion, added to its row.
    """

    requires_mismatched: ClassVar[bool] = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        window: int = 1000,
        sft_weight: float = 0.0,
    ) -> None:
        super().__init__(beta=beta, window=window, sft_weight=sft_weight)
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not 0 <= weight < math.inf:
                raise ConfigurationError(f"KTOLoss: {name} is {weight}; it must be 0 or more.")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def unpaired_loss(self, reward: Tensor, up: Tensor) -> Tensor:
        """Return the weighted `kto_loss` of each row, `[B]`."""
        losses = kto_loss(reward, up, self.beta * self.shift.clamp(min=0))
        return torch.where(up, self.desirable_weight * losses, self.undesirable_weight * losses)

    def observe(self, log_ratios: Tensor) -> None:
        """Update z_0 with the log-ratios `[B]` of mismatched completions."""
        self.update_shift(log_ratios)


class BCOUnpairedLoss(UnpairedLoss, RunningShiftLoss):
    """Binary classifier optimization (arXiv:2404.04656) of unpaired feedback: classifies completions as liked or not.

    The classifier's threshold δ is the mean reward of all completions, tracked by `RunningShiftLoss`; it needs no extra
    forward pass. (`BCOLoss` is the same loss for pairs.) The paper's weights for prompts whose thumbs-up and
    thumbs-down differ are not used.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        window: Number of recent rows, over all processes, in the running mean reward; a row with a user term and a
            generic term counts twice.
        sft_weight: Weight of the negative log-likelihood per token of a liked completion, added to its row.
    """

    def unpaired_loss(self, reward: Tensor, up: Tensor) -> Tensor:
        """Return `bco_unpaired_loss` of each row, `[B]`, and in training mode update the running mean."""
        losses = bco_unpaired_loss(reward, up, self.shift)
        if self.training:
            self.update_shift(reward.detach())
        return losses
