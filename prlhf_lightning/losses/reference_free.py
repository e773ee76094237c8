"""Losses without a reference: SimPO, CPO and ORPO for pairs, and supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import MarginLoss, PreferenceLoss
from prlhf_lightning.losses.margin import dpo_loss
from prlhf_lightning.types import Feedback, PairLogProbs


def simpo_loss(margin: Tensor, gamma: float) -> Tensor:
    """`-log σ(Δ - γ)`, with rewards `β/|y| log π(y|x)`: SimPO (arXiv:2405.14734, Eq. 6).

    Args:
        margin: `[B]` reward margins.
        gamma: Target margin.
    """
    return -F.logsigmoid(margin - gamma)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`-log σ( log [odds(y_c) / odds(y_r)] )`, with `odds = P/(1-P)`: ORPO's L_OR (arXiv:2403.07691, Eq. 7).

    Args:
        chosen: `[B]` mean log-probability per token of the chosen completions.
        rejected: `[B]` the same for the rejected completions.
    """
    return -F.logsigmoid((chosen - _log_one_minus_exp(chosen)) - (rejected - _log_one_minus_exp(rejected)))


def _log_one_minus_exp(log_prob: Tensor) -> Tensor:
    """Return `log(1 - e^x)`; finite even for a certain completion (x = 0)."""
    return torch.log(-torch.expm1(log_prob.clamp(max=-torch.finfo(log_prob.dtype).tiny)))


class SimPOLoss(MarginLoss):
    """Simple preference optimization (arXiv:2405.14734): mean log-probability per token as the reward.

    Args:
        beta: Scale of the rewards; far larger than in DPO, because rewards are means per token.
        gamma: Target margin, in units of the reward.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    requires_reference: ClassVar[bool] = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        if not gamma >= 0:
            raise ConfigurationError(f"SimPOLoss: gamma is {gamma}; the target margin must be 0 or more.")
        self.gamma = gamma

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return `β` times the mean log-probability per token of each completion, `[B]` and `[B]`."""
        return self.beta * policy.chosen.mean, self.beta * policy.rejected.mean

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `simpo_loss` of the margins, `[B]`."""
        return simpo_loss(margin, self.gamma)


class CPOLoss(MarginLoss):
    """Contrastive preference optimization (arXiv:2401.08417): DPO against a uniform reference, plus an SFT term.

    The SFT term is part of the method, so its weight is 1. It is per token as in TRL; the paper's is per completion.

    Args:
        beta: Scale of the rewards; a reward is the log-probability of the whole completion.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    requires_reference: ClassVar[bool] = False

    def __init__(self, beta: float = 0.1, sft_weight: float = 1.0) -> None:
        super().__init__(beta, sft_weight)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return CPO's L_prefer (arXiv:2401.08417, Eq. 3), `dpo_loss` of the margins, `[B]`."""
        return dpo_loss(margin)


class ORPOLoss(PreferenceLoss):
    """Odds ratio preference optimization (arXiv:2403.07691, Eq. 6): an SFT term plus beta times the odds-ratio loss.

    The SFT term is the main part of the method, so its weight is 1.

    Args:
        beta: Weight of the odds-ratio loss (the paper's λ).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    requires_reference: ClassVar[bool] = False

    def __init__(self, beta: float = 0.1, sft_weight: float = 1.0) -> None:
        super().__init__(beta, sft_weight)

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return `β` times the mean log-probability per token of each completion, `[B]` and `[B]`."""
        return self.beta * policy.chosen.mean, self.beta * policy.rejected.mean

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `β` times `odds_ratio_loss` of each pair, `[B]`."""
        return self.beta * odds_ratio_loss(policy.chosen.mean, policy.rejected.mean)


class SFTLoss(PreferenceLoss):
    """Supervised fine-tuning: mean negative log-likelihood per token of each chosen completion.

    For the stage before preference learning, or as a baseline. It ignores rejected completions, which may be missing.
    The reward is the mean log-probability per token, NaN for a missing completion.
    """

    requires_reference: ClassVar[bool] = False
    feedback: ClassVar[Feedback] = "demonstrations"

    def __init__(self) -> None:
        super().__init__(beta=1.0)

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability per token of each completion, `[B]` and `[B]`."""
        return policy.chosen.mean, policy.rejected.mean

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the mean negative log-likelihood per token of each chosen completion, `[B]`."""
        return -policy.chosen.mean
