"""Alignment via optimal transport (AOT, arXiv:2406.05882): losses of quantiles, not of pairs.

AOT trains the reward distribution of one side to dominate that of the other. It sorts each side within the batch and
compares them rank by rank. A row's loss therefore **depends on the other rows of its batch, by definition**: on the
micro-batch of one process, whatever the gradient accumulation or number of processes. At batch size 1 it is DPO.
"""

from __future__ import annotations

from torch import Tensor

from prlhf_lightning.losses.base import PreferenceLoss, check_label_smoothing
from prlhf_lightning.losses.margin import dpo_loss
from prlhf_lightning.types import PairLogProbs


def same_rank(values: Tensor, like: Tensor) -> Tensor:
    """Return for each row of `like` `[B]` the element of `values` `[B]` that has the same rank, `[B]`."""
    ranks = like.argsort(stable=True).argsort(stable=True)
    return values.sort().values[ranks]


class AOTLoss(PreferenceLoss):
    """AOT for paired data: trains the policy's chosen-minus-rejected margins to dominate the reference's.

    Each quantile's loss is returned at the row of its policy margin. It depends on the batch (see the module
    docstring); a larger micro-batch gives better quantiles.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        self.label_smoothing = check_label_smoothing(self, label_smoothing)

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the loss of each quantile, `[B]`, at the row of its policy margin."""
        assert reference is not None  # for the type checker; forward has checked it
        margin = policy.chosen.sum - policy.rejected.sum
        reference_margin = reference.chosen.sum - reference.rejected.sum
        return dpo_loss(self.beta * (margin - same_rank(reference_margin, margin)), self.label_smoothing)


class AOTUnpairedLoss(AOTLoss):
    """AOT for unpaired data: trains the rewards of chosen completions to dominate those of rejected ones.

    It ignores which chosen and rejected completions of a batch form a pair. Each quantile's loss is returned at the row
    of its chosen completion. It depends on the batch (see the module docstring).

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        label_smoothing: Probability that a preference is recorded the wrong way round, in [0, 0.5).
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the loss of each quantile, `[B]`, at the row of its chosen completion."""
        chosen, rejected = self.rewards(policy, reference)
        return dpo_loss(chosen - same_rank(rejected, chosen), self.label_smoothing)
