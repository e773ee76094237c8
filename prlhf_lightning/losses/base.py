"""Base classes of preference losses: log-probabilities of a batch of pairs in, one loss per pair out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import Feedback, LossOutput, PairLogProbs


class PreferenceLoss(nn.Module, ABC):
    """Base class: computes one loss per pair of completions from their log-probabilities.

    For a loss of the margin between the two rewards, subclass `MarginLoss`. For any other loss, subclass this class and
    implement `pair_loss`. A loss does not depend on users: the training module mixes the user term and the generic
    term, per pair.

    `sft_weight > 0` adds `sft_weight` times the mean negative log-likelihood per token of the chosen completion to
    each pair's loss. It keeps generated text fluent. With `DPOLoss` this is RPO (arXiv:2404.19733, Eq. 1).

    Attributes:
        requires_reference: False for losses that use only the policy; the reference is then never computed.
        requires_mismatched: True for losses that `observe` the log-ratios of mismatched completions in training.
        feedback: Kind of rows that the loss takes: pairs, thumbs (subclass `UnpairedLoss`) or demonstrations.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    requires_reference: ClassVar[bool] = True
    requires_mismatched: ClassVar[bool] = False
    feedback: ClassVar[Feedback] = "pairs"

    def __init__(self, beta: float = 0.1, sft_weight: float = 0.0) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 < beta < math.inf:
            raise ConfigurationError(f"{name}: beta is {beta}; it scales the rewards and must be above 0.")
        if not 0 <= sft_weight < math.inf:
            raise ConfigurationError(f"{name}: sft_weight is {sft_weight}; it must be 0 (no SFT term) or more.")
        self.beta = beta
        self.sft_weight = sft_weight

    @abstractmethod
    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the loss of each pair, `[B]`, without the SFT term.

        Args:
            policy: Log-probabilities under the policy.
            reference: The same under the reference; None if and only if `requires_reference` is False.
        """

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs | None) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards `[B]` of the chosen and of the rejected completions, differentiable.

        By default `β (log π(y|x) - log π_ref(y|x))`, DPO's Eq. 5 (arXiv:2305.18290) up to a constant of the prompt.
        Without a reference the last term is dropped. Override it in a loss that defines rewards differently.
        """
        chosen, rejected = policy.chosen.sum, policy.rejected.sum
        if reference is not None:
            chosen, rejected = chosen - reference.chosen.sum, rejected - reference.rejected.sum
        return self.beta * chosen, self.beta * rejected

    def observe(self, log_ratios: Tensor) -> None:
        """Receive the log-ratios `log π(y|x) - log π_ref(y|x)` `[B]` of completions paired with other prompts.

        In training, the module calls this after each batch's loss if `requires_mismatched` is True.
        """

    def forward(self, policy: PairLogProbs, reference: PairLogProbs | None = None) -> LossOutput:
        """Return the loss and the detached implicit rewards of each pair.

        Args:
            policy: Log-probabilities under the policy.
            reference: The same under the reference. Ignored if `requires_reference` is False.

        Raises:
            ConfigurationError: The reference or the rejected completions are missing, or `pair_loss` returned another
                shape than `[B]`.
        """
        name = type(self).__name__
        if not self.requires_reference:
            reference = None
        elif reference is None:
            raise ConfigurationError(
                f"{name} compares the policy with a reference and got none; "
                "pass the reference's log-probabilities, or use a loss without one such as SimPOLoss."
            )
        if self.feedback == "pairs" and policy.rejected.tokens.shape[-1] == 0:
            raise ConfigurationError(
                f"{name} compares two completions, but this batch has no rejected ones; "
                "give data with a 'rejected' field, or train on the chosen ones with SFTLoss."
            )
        losses = self.pair_loss(policy, reference)
        if losses.shape != (pairs := policy.chosen.sum.shape):  # broadcasting would hide a mean
            raise ConfigurationError(
                f"{name} returned a loss of shape {list(losses.shape)} for {pairs[0]} pairs; return one for each, "
                f"{list(pairs)}, neither averaged nor summed."
            )
        if self.sft_weight:
            # A row without a chosen completion (a thumbs-down) gets no SFT term.
            losses = losses - self.sft_weight * policy.chosen.sum / policy.chosen.lengths.clamp(min=1)
        with torch.no_grad():
            chosen_rewards, rejected_rewards = self.rewards(policy, reference)
        return LossOutput(losses, chosen_rewards, rejected_rewards)


class MarginLoss(PreferenceLoss):
    """Base class of losses that depend only on the margin between the two implicit rewards of a pair.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    @abstractmethod
    def margin_loss(self, margin: Tensor) -> Tensor:
        """Return the loss of each pair, `[B]`.

        Args:
            margin: `[B]` reward of the chosen minus that of the rejected completion, β included.
        """

    def pair_loss(self, policy: PairLogProbs, reference: PairLogProbs | None) -> Tensor:
        """Return the loss of each pair's margin, `[B]`."""
        chosen, rejected = self.rewards(policy, reference)
        return self.margin_loss(chosen - rejected)


def check_label_smoothing(loss: nn.Module, value: float) -> float:
    """Return a label-smoothing probability, or raise if it is not in [0, 0.5)."""
    if not 0 <= value < 0.5:
        raise ConfigurationError(
            f"{type(loss).__name__}: label_smoothing is {value}; as the probability that a preference is "
            "recorded the wrong way round it must be at least 0 and below 0.5."
        )
    return value
