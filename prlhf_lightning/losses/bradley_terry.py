"""The Bradley-Terry loss of explicit rewards."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import MarginLoss, check_label_smoothing
from prlhf_lightning.losses.margin import dpo_loss
from prlhf_lightning.types import PairLogProbs


class BradleyTerryLoss(MarginLoss):
    """`-log σ(r_c - r_r - gap)`: the loss of reward models (Bradley and Terry 1952; arXiv:2307.09288, Eq. 2).

    `center_rewards_coefficient` c adds `c (r_c + r_r)²` (arXiv:2312.09244), as in TRL: choices leave the mean of
    rewards open, and the term keeps it near zero.

    Args:
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5).
        gap: Difference that the chosen completion's reward must exceed; 0 is the likelihood of the choices.
        center_rewards_coefficient: Weight c of the squared sum of the two rewards; 0 for none.
    """

    requires_reference: ClassVar[bool] = False

    def __init__(self, label_smoothing: float = 0.0, gap: float = 0.0, center_rewards_coefficient: float = 0.0) -> None:
        super().__init__(beta=1.0)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)
        if not 0 <= gap < math.inf:
            raise ConfigurationError(f"BradleyTerryLoss: gap is {gap}; it must be 0 or more.")
        if not 0 <= center_rewards_coefficient < math.inf:
            raise ConfigurationError(
                f"BradleyTerryLoss: center_rewards_coefficient is {center_rewards_coefficient}; it must be 0 (no "
                "centering) or more."
            )
        self.gap = gap
        self.center_rewards_coefficient = center_rewards_coefficient

    @property
    def is_likelihood(self) -> bool:
        """Whether the loss is the negative log-likelihood of the choices."""
        return self.label_smoothing == 0 and self.gap == 0 and self.center_rewards_coefficient == 0

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return the loss of each pair, `[B]`."""
        return dpo_loss(margin - self.gap, self.label_smoothing)

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the loss of each pair's margin and, if that is set, the penalty of its mean reward, `[B]`."""
        losses = super().pair_loss(policy, reference)
        if not self.center_rewards_coefficient:
            return losses
        chosen, rejected = self.rewards(policy, reference)
        return losses + self.center_rewards_coefficient * (chosen + rejected) ** 2
