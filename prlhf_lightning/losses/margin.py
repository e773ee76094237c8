"""Losses of the margin between the implicit rewards of the chosen and the rejected completion.

`margin` is always `Δ = β [log π(y_c|x) - log π_ref(y_c|x) - log π(y_r|x) + log π_ref(y_r|x)]`, `[B]`.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import MarginLoss, check_label_smoothing
from prlhf_lightning.types import PairLogProbs


def dpo_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-(1-ε) log σ(Δ) - ε log σ(-Δ)`: DPO (arXiv:2305.18290, Eq. 7); with ε > 0 conservative DPO.

    Args:
        margin: `[B]` reward margins.
        label_smoothing: ε, the probability that a preference is recorded the wrong way round.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """`(Δ/β - 1/(2β))²`: IPO (arXiv:2310.12036, Eq. 17, where β is called τ).

    Args:
        margin: `[B]` reward margins, β included.
        beta: Strength of the regularization towards the reference.
    """
    return ((margin - 0.5) / beta) ** 2


def hinge_loss(margin: Tensor) -> Tensor:
    """`max(0, 1 - Δ)`: SLiC (arXiv:2305.10425) on likelihood ratios, as in RSO (arXiv:2309.06657)."""
    return F.relu(1 - margin)


def robust_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """`[-(1-ε) log σ(Δ) + ε log σ(-Δ)] / (1 - 2ε)`: robust DPO (arXiv:2403.00409).

    Its expectation over labels flipped with probability ε is the DPO loss of the clean labels. It can be negative and
    has no lower bound as the margin grows.

    Args:
        margin: `[B]` reward margins.
        label_smoothing: ε, the probability that a preference is recorded the wrong way round.
    """
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """`KL( (σ(Δ), σ(-Δ)) || (1-ε, ε) )`: EXO for a pair (arXiv:2402.00856, Eq. 16).

    Args:
        margin: `[B]` reward margins.
        label_smoothing: ε, above 0: with hard labels the reverse KL is infinite.
    """
    win = F.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    lose = F.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return win + lose


def discopop_loss(margin: Tensor, tau: float) -> Tensor:
    """`(1-m) (-log σ(Δ)) + m e^{-Δ}`, with `m = σ(Δ/τ)`: DiscoPOP (arXiv:2406.08414, Eq. 5).

    Args:
        margin: `[B]` reward margins.
        tau: Temperature of the switch between the logistic and the exponential part.
    """
    logistic = -F.logsigmoid(margin) * F.sigmoid(-margin / tau)
    # One exponential: computed separately, e^{-Δ} overflows at large negative margins, m is 0, and the product is NaN.
    exponential = (F.logsigmoid(margin / tau) - margin).exp()
    return logistic + exponential


class DPOLoss(MarginLoss):
    """Direct preference optimization (arXiv:2305.18290); P-DPO (arXiv:2402.05133) with a user model and α mixing.

    With `label_smoothing > 0` it is conservative DPO; with `sft_weight > 0` it is RPO (arXiv:2404.19733, Eq. 1).

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `dpo_loss` of the margins, `[B]`."""
        return dpo_loss(margin, self.label_smoothing)


class IPOLoss(MarginLoss):
    """Identity preference optimization (arXiv:2310.12036): regression of the margin onto 1/2.

    Rewards are log-ratios per token, not per completion: otherwise the square would weight long completions more. The
    paper does not state this; its authors confirmed it to the authors of TRL.

    Args:
        beta: Strength of the regularization (the paper's τ); the target gap of the per-token log-ratios is 1/(2 beta).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return `β` times the mean log-ratio per token of each completion, `[B]` and `[B]`."""
        chosen, rejected = super().rewards(policy, reference)
        return chosen / policy.chosen.lengths, rejected / policy.rejected.lengths

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `ipo_loss` of the margins, `[B]`."""
        return ipo_loss(margin, self.beta)


class HingeLoss(MarginLoss):
    """Hinge loss (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657); zero for pairs with a margin above 1.

    Args:
        beta: Scale of the implicit rewards; the target gap of the log-ratios is 1/beta.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `hinge_loss` of the margins, `[B]`."""
        return hinge_loss(margin)


class RobustLoss(MarginLoss):
    """Robust DPO (arXiv:2403.00409): unbiased if a known share of the preferences is flipped at random.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5); 0 is plain DPO.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `robust_loss` of the margins, `[B]`."""
        return robust_loss(margin, self.label_smoothing)


class EXOLoss(MarginLoss):
    """Efficient exact optimization (arXiv:2402.00856): reverse KL from the policy's choice to the smoothed label.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        label_smoothing: Probability that a preference is recorded the wrong way round, in (0, 0.5).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)
        if label_smoothing == 0:
            raise ConfigurationError("EXOLoss: label_smoothing is 0, which makes the loss infinite; try 0.001.")

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `exo_loss` of the margins, `[B]`."""
        return exo_loss(margin, self.label_smoothing)


class DiscoPOPLoss(MarginLoss):
    """DiscoPOP (arXiv:2406.08414): a blend of logistic and exponential loss, found by a language model.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        tau: Temperature of the switch between the logistic part (negative margins) and the exponential one.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def __init__(self, beta: float = 0.1, tau: float = 0.05, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        if not 0 < tau < 1:
            raise ConfigurationError(
                f"DiscoPOPLoss: tau is {tau}; it must be between 0 and 1 (the paper uses 0.05): "
                "from 1 on, the loss grows exponentially with the error."
            )
        self.tau = tau

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return `discopop_loss` of the margins, `[B]`."""
        return discopop_loss(margin, self.tau)
