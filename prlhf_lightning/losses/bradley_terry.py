"""The Bradley-Terry loss of explicit rewards."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import MarginLoss, check_label_smoothing
from prlhf_lightning.losses.margin import dpo_loss


class BradleyTerryLoss(MarginLoss):
    """`-log σ(r_c - r_r - gap)`: the loss of reward models (Bradley and Terry 1952; arXiv:2307.09288, Eq. 2).

    Args:
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5).
        gap: Difference that the chosen completion's reward must exceed; 0 is the likelihood of the choices.
    """

    requires_reference: ClassVar[bool] = False

    def __init__(self, label_smoothing: float = 0.0, gap: float = 0.0) -> None:
        super().__init__(beta=1.0)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)
        if not 0 <= gap < math.inf:
            raise ConfigurationError(f"BradleyTerryLoss: gap is {gap}; it must be 0 or more.")
        self.gap = gap

    @property
    def is_likelihood(self) -> bool:
        """Whether the loss is the negative log-likelihood of the choices."""
        return self.label_smoothing == 0 and self.gap == 0

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return the loss of each pair, `[B]`."""
        return dpo_loss(margin - self.gap, self.label_smoothing)
