"""Policy-gradient losses of online RL: log-probs of sampled completions and their advantages in, one number out.

A loss is a sum over tokens, divided by a denominator of the *whole* optimizer step. So gradients of micro-batches and
of processes add up to those of one large batch, however unequal their lengths are.

Shapes: B completions, L tokens. Only true positions of the mask count: the side of the padding does not matter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.kl import KLEstimator, importance_ratio, kl_estimates


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one optimizer step over all its micro-batches and processes: what denominators are made of.

    Attributes:
        sequences: Number of completions in the step.
        tokens: Number of their tokens.
        max_length: Most tokens that a completion may have.
        mean_length: Mean number of tokens of the completions of the whole generation batch, of which this step may
            train only a part.
    """

    sequences: int
    tokens: int
    max_length: int
    mean_length: float

    @classmethod
    def of(cls, lengths: Tensor, max_length: int, generated: Tensor | None = None) -> StepSizes:
        """Return the sizes of a step, given the lengths `[n]` of all its completions.

        Args:
            lengths: `[n]` number of tokens of each completion of the step, of all micro-batches and processes.
            max_length: Most tokens that a completion may have.
            generated: `[N]` the same for the whole generation batch; None if the step trains all of it.
        """
        generated = lengths if generated is None else generated
        mean = float(generated.double().mean()) if len(generated) else 0.0
        return cls(len(lengths), int(lengths.sum()), max_length, mean)


@dataclass(frozen=True)
class PolicyGradientOutput:
    """Output of a policy-gradient loss for one micro-batch; everything but the loss is detached.

    Attributes:
        loss: `[]` this micro-batch's share of the step's loss, differentiable; shares are added, not averaged.
        kl: `[B]` estimated KL divergence to the reference, summed over the tokens of each completion, in nats; 0
            without a reference.
        clipped: `[B]` number of tokens whose advantage has no gradient because their ratio is outside the clip range.
        drift: `[B]` largest `|log π - log π_old|` of a token of each completion; 0 as long as the policy is the one
            that sampled them.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    drift: Tensor


class PolicyGradientLoss(nn.Module, ABC):
    """Base class: a sum over tokens of a policy loss and of `β` KL(π || π_ref), over the step's denominator.

    A subclass says what a token's loss is (`policy_loss`), how it is averaged (`token_weights`, `denominator`), and
    whether the importance ratio is one of tokens or of sequences (`log_importance`). A loss does not depend on users:
    rewards and advantages do.

    Args:
        beta: Weight of the KL divergence to the reference; 0 needs no reference.
        kl: Estimator of the KL divergence. It changes the value that is logged; the gradient is the same for all.
    """

    def __init__(self, beta: float = 0.0, kl: KLEstimator = "k3") -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 <= beta < math.inf:
            raise ConfigurationError(
                f"{name}: beta is {beta}; as the weight of the KL divergence it must be 0 or more."
            )
        if kl not in ("k1", "k2", "k3"):
            raise ConfigurationError(f"{name}: kl is {kl!r}; it must be 'k1', 'k2' or 'k3'.")
        self.beta = beta
        self.kl: KLEstimator = kl

    @property
    def requires_reference(self) -> bool:
        """Whether the reference's log-probs are needed."""
        return self.beta > 0

    @abstractmethod
    def policy_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """Return the loss of each token without KL, `[B, L]`, or `[B, 1]` for one of the whole sequence.

        Args:
            ratio: `[B, L]` (or `[B, 1]`) importance ratio `π / π_old`, differentiable.
            log_probs: `[B, L]` log π of the tokens, differentiable.
            advantages: `[B, 1]`.
        """

    @abstractmethod
    def denominator(self, sizes: StepSizes) -> float:
        """Return what the sum over the whole optimizer step is divided by."""

    def token_weights(self, mask: Tensor) -> Tensor:
        """Return the weight of each token in the sum, `[B, L]`; 1 by default."""
        return torch.ones_like(mask, dtype=torch.float32)

    def log_importance(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Return the log of the importance ratio: that of each token by default, `[B, L]`, or of sequences, `[B, 1]`.

        Args:
            log_ratio: `[B, L]` log π - log π_old of each token, 0 where masked.
            mask: `[B, L]` bool.
        """
        return log_ratio

    def is_clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Return where the advantage has no gradient, a bool in the shape of `ratio`; nowhere by default."""
        return torch.zeros_like(ratio, dtype=torch.bool)

    def shaped_rewards(
        self, rewards: Tensor, old_log_probs: Tensor, reference_log_probs: Tensor | None, mask: Tensor
    ) -> Tensor:
        """Return the rewards `[B]` from which advantages are computed: unchanged by default.

        Args:
            rewards: `[B]`, NaN for completions that could not be scored.
            old_log_probs: `[B, L]` log-probs under the policy that sampled the completions.
            reference_log_probs: `[B, L]` log-probs under the reference, or None.
            mask: `[B, L]` bool.
        """
        return rewards

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        denominator: float,
        reference_log_probs: Tensor | None = None,
    ) -> PolicyGradientOutput:
        """Return a micro-batch's share of the loss of its optimizer step, and what to log.

        Add the gradients of all micro-batches and processes. Lightning divides losses by the number of accumulated
        batches, and DDP gradients by the number of processes: multiply the loss by both.

        Args:
            log_probs: `[B, L]` log π of the completions' tokens, at the temperature at which they were sampled.
            old_log_probs: `[B, L]` the same under the policy that sampled them; used without its gradient.
            mask: `[B, L]` bool, true on the completions' tokens; other positions may hold anything.
            advantages: `[B]`.
            denominator: `self.denominator(sizes)` of the whole optimizer step.
            reference_log_probs: `[B, L]` log π_ref of the tokens; needed if `kl_weight` is above 0.

        Raises:
            ConfigurationError: Shapes do not fit, or the reference is missing.
        """
        self._check(log_probs, old_log_probs, mask, advantages, reference_log_probs)
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        # `where` and not a product, here and below: NaN times 0 is NaN.
        log_probs = torch.where(mask, log_probs.to(dtype), 0.0)
        log_ratio = torch.where(mask, log_probs - old_log_probs.detach(), 0.0)
        advantages = advantages.detach().to(dtype)[:, None]
        ratio = importance_ratio(self.log_importance(log_ratio, mask))
        losses = self.policy_loss(ratio, log_probs, advantages)
        kl = torch.zeros_like(log_probs)
        if reference_log_probs is not None:
            reference = torch.where(mask, reference_log_probs.to(dtype), 0.0)
            kl = kl_estimates(log_probs, reference, importance_ratio(log_ratio), self.kl)
            losses = losses + self.kl_weight * kl
        loss = torch.where(mask, losses * self.token_weights(mask).to(dtype), 0.0).sum() / denominator
        clipped = (self.is_clipped(ratio, advantages) & mask).sum(1)
        drift = F.pad(log_ratio.detach().abs(), (0, 1)).amax(1)  # padded: there may be no token at all
        return PolicyGradientOutput(loss, kl.detach().sum(1), clipped, drift)

    @property
    def kl_weight(self) -> float:
        """Weight of the KL divergence in the loss."""
        return self.beta

    def _check(
        self, log_probs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> None:
        name, shape = type(self).__name__, log_probs.shape
        others = {"old_log_probs": old, "mask": mask}
        if reference is not None:
            others["reference_log_probs"] = reference
        elif self.kl_weight > 0:
            raise ConfigurationError(
                f"{name} with beta {self.beta} compares the policy with a reference and got none; "
                "pass the reference's log-probs, or set beta to 0."
            )
        for other, value in others.items():
            if value.shape != shape:
                raise ConfigurationError(
                    f"{name}: {other} has shape {list(value.shape)} and log_probs {list(shape)}; they must be equal."
                )
        if advantages.shape != shape[:1]:  # broadcasting would mix rows
            raise ConfigurationError(
                f"{name}: advantages have shape {list(advantages.shape)} for {shape[0]} completions; "
                f"give one for each, {[shape[0]]}."
            )
