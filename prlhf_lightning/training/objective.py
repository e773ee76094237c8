"""The objective: the loss of each pair under its own user and under the generic user, mixed by alpha."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import LossOutput, PairLogProbs, PreferenceBatch, Tokens, to_device


@dataclass(frozen=True)
class Term:
    """One term of the objective: the pairs of a batch under their own users or under the generic user.

    Attributes:
        generic: Whether the generic user replaced each user; false for terms that were sampled pair by pair.
        log_probs: The policy's log-probabilities.
        output: The loss's per-pair result.
        reference: The reference's log-probabilities, if the loss has one.
    """

    generic: bool
    log_probs: PairLogProbs
    output: LossOutput
    reference: PairLogProbs | None = None

    @property
    def margins(self) -> Tensor:
        """`[B]` reward of the chosen completion minus that of the rejected one."""
        return self.output.chosen_rewards - self.output.rejected_rewards


@dataclass(frozen=True)
class Objective:
    """The training objective of a model.

    Attributes:
        model: Scores the completions.
        alpha: Weight of the user's own term, in [0, 1]; the generic user's has 1 - alpha.
    """

    model: PersonalizedModel
    alpha: float

    def compute(
        self, batch: PreferenceBatch, every_term: bool = False, sampled: bool = False
    ) -> tuple[Tensor, list[Term]]:
        """Compute the alpha-weighted loss of each pair, and its terms; see `PersonalizedLM.objective`."""
        model = self.model
        # Scored first, while no graph is held, and passed to the loss last, so that no row is judged by its own batch.
        observes = model.loss.requires_mismatched and model.loss.training
        mismatched = self._mismatched_log_ratios(batch) if observes else None
        losses, terms = self._compute(batch, every_term, sampled)
        auxiliary = model.policy.auxiliary_loss()
        if auxiliary is not None:  # over all rows, so that each pair counts once
            losses = losses + auxiliary
        if mismatched is not None:
            model.loss.observe(mismatched)
        return losses, terms

    @property
    def _weights(self) -> dict[bool, float]:
        """The weight of the user's own term, and of the generic one if there is one."""
        return {False: self.alpha, True: 1.0 - self.alpha} if self.model.user_model.personalizes else {False: 1.0}

    def _compute(self, batch: PreferenceBatch, every_term: bool, sampled: bool) -> tuple[Tensor, list[Term]]:
        model = self.model
        penalty = model.penalty(batch)
        if sampled and model.user_model.personalizes:
            generic = torch.rand(len(batch)) >= self.alpha
            drawn = model.log_probs_under_either(batch, generic)
            reference = model.reference_log_probs(batch)
            output = model.loss(drawn, reference)
            losses = output.losses
            if penalty is not None:
                losses = losses + penalty.masked_fill(to_device(generic, penalty.device), 0.0)
            return losses, [Term(False, drawn, output, reference)]
        weights = self._weights
        kinds = [generic for generic, weight in weights.items() if weight > 0 or every_term]
        reference = model.reference_log_probs(batch)
        scored = model.log_probs(batch, kinds)
        terms = [
            Term(g, policy, model.loss(policy, reference), reference) for g, policy in zip(kinds, scored, strict=True)
        ]
        # P-DPO, arXiv:2402.05133: mixed pair by pair, before the mean over the batch.
        losses = torch.stack([weights[term.generic] * term.output.losses for term in terms]).sum(0)
        if penalty is not None:
            losses = losses + weights[False] * penalty
        return losses, terms

    @torch.no_grad()
    def _mismatched_log_ratios(self, batch: PreferenceBatch) -> Tensor | None:
        """Return log-ratios of mismatched completions: each row's prompt with the completion of the previous row.

        Returns:
            `[B]` means over the terms; `[0]` for a single row, which could only be matched with itself. It is scored
            anyway, since other processes may wait for this one.
        """
        chosen, rejected = (
            Tokens(part.ids.roll(1, 0), part.mask.roll(1, 0)) for part in (batch.chosen, batch.rejected)
        )
        mixed = replace(batch, chosen=chosen, rejected=rejected, reference=None, reference_keys=())
        reference = self.model.reference_log_probs(mixed)
        scored = self.model.log_probs(mixed, [generic for generic, weight in self._weights.items() if weight > 0])
        if reference is None:
            return None
        ratios = [p.chosen.sum + p.rejected.sum - reference.chosen.sum - reference.rejected.sum for p in scored]
        return torch.stack(ratios).mean(0)[: len(batch) if len(batch) > 1 else 0]
