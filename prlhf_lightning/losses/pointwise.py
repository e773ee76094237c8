"""Losses that judge the chosen and the rejected completion each by its own implicit reward, not only their margin.

Throughout, `chosen` and `rejected` are `r = β [log π(y|x) - log π_ref(y|x)]`, `[B]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import PreferenceLoss
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
    """`-log σ(r_c - δ) - log σ(-(r_r - δ))`: binary classifier optimisation of a pair (arXiv:2404.04656).

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
    """Anchored preference optimisation, zero (arXiv:2408.06266): chosen up, rejected down.

    For data whose chosen completions are better than what the policy writes.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `apo_zero_loss` of each pair's rewards, `[B]`."""
        return apo_zero_loss(*self.rewards(policy, reference))


class APODownLoss(PreferenceLoss):
    """Anchored preference optimisation, down (arXiv:2408.06266): chosen down, rejected further down.

    For data whose chosen completions are worse than what the policy writes.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `apo_down_loss` of each pair's rewards, `[B]`."""
        return apo_down_loss(*self.rewards(policy, reference))


class NCALoss(PreferenceLoss):
    """Noise contrastive alignment (arXiv:2402.05369): absolute likelihoods, so the chosen one's does not sink.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `nca_loss` of each pair's rewards, `[B]`."""
        return nca_loss(*self.rewards(policy, reference))


class SPPOLoss(PreferenceLoss):
    """Self-play preference optimisation with hard labels (arXiv:2405.00675): regression of rewards onto ±1/2.

    Args:
        beta: Inverse of the paper's η; each log-ratio is drawn to 1/(2 beta), up for chosen, down for rejected.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `sppo_loss` of each pair's rewards, `[B]`."""
        return sppo_loss(*self.rewards(policy, reference), beta=self.beta)


class BCOLoss(PreferenceLoss):
    """Binary classifier optimisation of pairs (arXiv:2404.04656): is this completion chosen or rejected?

    The classifier's threshold δ is the mean reward of all completions, a moving target that is tracked as a running
    mean: exponential, over about the last `window` pairs, counted in pairs and over all processes. A call judges its
    pairs with the δ of the calls before it, so no pair's loss depends on which others stand in the same call, and
    cutting the same stream of pairs into other (micro-)batches moves δ only by the order of pairs within one of them.
    User and generic terms, being two calls, share one δ. It starts at 0, about the reward of an untrained policy,
    changes in training mode only, and is part of the state dict: a resumed run needs it.

    In training under `torch.distributed` each call is a collective: all processes must make it.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        window: Number of recent pairs, over all processes, that the running mean reward remembers.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    shift: Tensor
    pairs_seen: Tensor

    def __init__(self, beta: float = 0.1, window: int = 1000, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        if window < 1:
            raise ConfigurationError(f"BCOLoss: window is {window}; the running mean needs at least 1 pair.")
        self.window = window
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("pairs_seen", torch.zeros((), dtype=torch.int64))

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return `bco_loss` of each pair's rewards, `[B]`, and in training mode update the running mean."""
        chosen, rejected = self.rewards(policy, reference)
        losses = bco_loss(chosen, rejected, self.shift)
        if self.training:
            self._update_shift((chosen.detach() + rejected.detach()) / 2)
        return losses

    def _update_shift(self, rewards: Tensor) -> None:
        """Move the running mean towards the mean rewards `[B]` of new pairs, weighing each pair alike."""
        batch = torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))]).to(torch.float32)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(batch)
        total, pairs = batch
        self.pairs_seen += pairs.long()
        decay = 1 - 1 / self.window
        # The denominator takes the start's 0 out of the mean, as in Adam's bias correction.
        weight = (1 - decay**pairs) / (1 - decay**self.pairs_seen).clamp(min=1e-12)
        self.shift += weight * (total / pairs.clamp(min=1) - self.shift)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the running mean in float32 under any cast: bfloat16 would swallow its small steps."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shift = self.shift.to(torch.float32)
        return self
