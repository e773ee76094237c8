"""Losses for unpaired feedback: one completion a row, which its user liked (thumbs up) or not (thumbs down).

A row's one completion stands where that of a pair would: as the chosen one if it was liked, as the rejected one if not.
The other is empty, and its reward is NaN.
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
    """A loss of each row's one completion and whether it was liked; to add one, write `unpaired_loss`.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of a liked completion, added to its row.
    """

    feedback: ClassVar[Feedback] = "thumbs"

    @abstractmethod
    def unpaired_loss(self, reward: Tensor, up: Tensor) -> Tensor:
        """Return the loss of each row, `[B]`.

        Args:
            reward: `[B]` reward of the row's completion.
            up: `[B]` bool, whether it was liked.
        """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `unpaired_loss` of each row, `[B]`."""
        chosen, rejected = super().rewards(policy, reference)
        up = policy.chosen.mask.any(-1)
        return self.unpaired_loss(torch.where(up, chosen, rejected), up)

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards `[B]` of liked and of disliked completions, NaN where a row has not this one."""
        chosen, rejected = super().rewards(policy, reference)
        up = policy.chosen.mask.any(-1)
        return chosen.masked_fill(~up, math.nan), rejected.masked_fill(up, math.nan)


class KTOLoss(UnpairedLoss, RunningShiftLoss):
    """Kahneman-Tversky optimization (arXiv:2402.01306) of thumbs.

    The reference point z_0, in the paper the divergence of the policy from the reference, is estimated as there from
    completions that answer other prompts of the batch: the mean of their log-ratios, and 0 where that is negative. But
    it is a running mean (see `RunningShiftLoss`; `shift` is z_0 before it is cut off at 0), and a batch is judged by
    the batches before it. So a row's loss depends on no other row of its batch, and small batches do not make z_0
    noisy. Under user and generic term alike z_0 is the mean over both. It costs a forward pass of policy and reference
    for each batch, without gradient, and needs batches of two rows or more.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        desirable_weight: Weight of rows with a thumbs-up (the paper's λ_D).
        undesirable_weight: Weight of rows with a thumbs-down (λ_U). Where one kind is much rarer, weigh it more, so
            that both kinds have about the same weight in all.
        window: Number of recent rows, over all processes, that z_0 remembers.
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
        """Move z_0 towards the log-ratios `[B]` of mismatched completions."""
        self.update_shift(log_ratios)


class BCOUnpairedLoss(UnpairedLoss, RunningShiftLoss):
    """Binary classifier optimization (arXiv:2404.04656) of thumbs: was this completion liked or not?

    The classifier's threshold δ is the mean reward of all completions, tracked as `RunningShiftLoss` says; it needs no
    further pass through the policy. (`BCOLoss` is the same for pairs.) The paper's weights for prompts whose thumbs-up
    and thumbs-down differ are not used.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        window: Number of recent rows, over all processes, that the running mean reward remembers; one that has a user
            and a generic term counts twice.
        sft_weight: Weight of the negative log-likelihood per token of a liked completion, added to its row.
    """

    def unpaired_loss(self, reward: Tensor, up: Tensor) -> Tensor:
        """Return `bco_unpaired_loss` of each row, `[B]`, and in training mode update the running mean."""
        losses = bco_unpaired_loss(reward, up, self.shift)
        if self.training:
            self.update_shift(reward.detach())
        return losses
