"""Losses of the two implicit rewards of a pair, not only of their margin.

Always, `chosen` and `rejected` are `r = β [log π(y|x) - log π_ref(y|x)]`, `[B]`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.losses.base import PreferenceLoss
from prlhf_lightning.losses.running import RunningShiftLoss
from prlhf_lightning.types import PairLogProbs


def apo_zero_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`-σ(r_c) + σ(r_r) + 1`: APO-zero (arXiv:2408.06266, Eq. 7; the 1 keeps it positive)."""
    return F.sigmoid(-chosen) + F.sigmoid(rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`σ(r_c) - σ(r_c - r_r) + 1`: APO-down (arXiv:2408.06266, Eq. 8; the 1 keeps it positive)."""
    return F.sigmoid(chosen) + F.sigmoid(rejected - chosen)


def nca_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`-log σ(r_c) - ½ log σ(-r_c) - ½ log σ(-r_r)`: noise contrastive alignment of a pair (arXiv:2402.05369)."""
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_loss(chosen: Tensor, rejected: Tensor, shift: Tensor | float) -> Tensor:
    """`-log σ(r_c - δ) - log σ(-(r_r - δ))`: binary classifier optimization of a pair (arXiv:2404.04656).

    Args:
        chosen: `[B]` rewards of the chosen completions.
        rejected: `[B]` rewards of the rejected completions.
        shift: δ, the mean reward of both; the classifier's threshold.
    """
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def sppo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`(r_c/β - 1/(2β))² + (r_r/β + 1/(2β))²`: SPPO with hard labels (arXiv:2405.00675, Eq. 4.7 with P = 1 and 0).

    Args:
        chosen: `[B]` rewards of the chosen completions, β included.
        rejected: `[B]` rewards of the rejected completions, β included.
        beta: The inverse of the paper's η.
    """
    return ((chosen - 0.5) / beta) ** 2 + ((rejected + 0.5) / beta) ** 2


class APOZeroLoss(PreferenceLoss):
    """Anchored preference optimization, zero (arXiv:2408.06266): raises the chosen, lowers the rejected reward.

    For data whose chosen completions are better than the policy's own.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `apo_zero_loss` of each pair's rewards, `[B]`."""
        return apo_zero_loss(*self.rewards(policy, reference))


class APODownLoss(PreferenceLoss):
    """Anchored preference optimization, down (arXiv:2408.06266): lowers both rewards, the rejected one more.

    For data whose chosen completions are worse than the policy's own.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `apo_down_loss` of each pair's rewards, `[B]`."""
        return apo_down_loss(*self.rewards(policy, reference))


class NCALoss(PreferenceLoss):
    """Noise contrastive alignment (arXiv:2402.05369): keeps the likelihood of the chosen completion from falling.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `nca_loss` of each pair's rewards, `[B]`."""
        return nca_loss(*self.rewards(policy, reference))


class SPPOLoss(PreferenceLoss):
    """Self-play preference optimization with hard labels (arXiv:2405.00675): regression of rewards onto ±1/2.

    Args:
        beta: Inverse of the paper's η; the targets of the log-ratios are 1/(2 beta) (chosen), -1/(2 beta) (rejected).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `sppo_loss` of each pair's rewards, `[B]`."""
        return sppo_loss(*self.rewards(policy, reference), beta=self.beta)


class BCOLoss(RunningShiftLoss):
    """Binary classifier optimization of pairs (arXiv:2404.04656): classifies completions as chosen or rejected.

    The classifier's threshold δ is the mean reward of all completions, tracked by `RunningShiftLoss`.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        window: Number of recent pairs, over all processes, in the running mean reward; a pair with a user term and a
            generic term counts twice.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `bco_loss` of each pair's rewards, `[B]`, and in training mode update the running mean."""
        chosen, rejected = self.rewards(policy, reference)
        losses = bco_loss(chosen, rejected, self.shift)
        if self.training:
            self.update_shift((chosen.detach() + rejected.detach()) / 2)
        return losses
