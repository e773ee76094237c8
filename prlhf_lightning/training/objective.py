"""The objective: the loss of each pair under its own user and under the generic user, mixed by alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.histories import pooled
from prlhf_lightning.training.reference_store import ReferenceStore
from prlhf_lightning.types import (
    LogProbs,
    LossOutput,
    PairLogProbs,
    PreferenceBatch,
    SoftPrompt,
    Tokens,
    Users,
    to_device,
)
from prlhf_lightning.user_models import UserModel


@dataclass(frozen=True)
class Term:
    """One term of the objective: the pairs of a batch as one kind of user sees them.

    Attributes:
        generic: Whether the generic user stood in each user's place; false of terms that were drawn pair by pair.
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
        """`[B]` reward of the chosen less that of the rejected completion."""
        return self.output.chosen_rewards - self.output.rejected_rewards


@dataclass(frozen=True)
class Objective:
    """What is computed of a batch; it owns none of its parts, and is made anew for each use of them.

    Attributes:
        user_model: Turns users into soft-prompt vectors.
        policy: The language model that the vectors condition.
        loss: The pairwise objective of which both terms are made.
        alpha: Weight of the user's own term, in [0, 1]; the generic user's has 1 - alpha.
        vocabulary: The users that the table has a row for, once they are known.
        store: Where the reference's log-probs are kept, if they are.
    """

    user_model: UserModel
    policy: Policy
    loss: PreferenceLoss
    alpha: float
    vocabulary: UserVocabulary | None
    store: ReferenceStore | None

    def users(self, user_ids: Sequence[str], user_text: Tokens, reference: bool = False) -> Users:
        """Look up users and embed their texts; see `PersonalizedLM.users`."""
        if self.vocabulary is None:
            raise ConfigurationError("The users are not known yet: call setup() or load a checkpoint first.")
        rows = to_device(self.vocabulary.rows(user_ids), user_text.ids.device)
        with_text = self.user_model.uses_text and user_text.ids.shape[1] > 0
        return Users(rows, self.policy.embed(user_text, reference) if with_text else None)

    def _users_of(self, batch: PreferenceBatch) -> Users:
        """Look up a batch's users, with what they preferred before where the user model reads it."""
        users = self.users(batch.user_ids, batch.user_text)
        if batch.history is None or not self.user_model.history_size:
            return users
        return replace(users, history=pooled(self.policy, batch.history))

    def reference_log_probs(self, batch: PreferenceBatch) -> PairLogProbs | None:
        """Score a batch's completions under the reference; see `PersonalizedLM.reference_log_probs`."""
        if not self.loss.requires_reference:
            return None
        if batch.reference is not None:
            return batch.reference
        first, of_pair = self._distinct(batch)
        with torch.no_grad():
            visible = self.user_model.reference(self.users(batch.user_ids, batch.user_text, reference=True))
        visible = visible.select(first) if visible is not None else None
        completions = [part.select(first) for part in self._completions(batch)]
        scored = self.policy.reference_log_probs(batch.prompt.select(first), completions, visible)
        reference = self._pair(scored, batch.desirable[first]).select(of_pair)
        if self.store is not None and batch.reference_keys:
            reference = self.store.keep(batch, reference)
        return reference

    def policy_log_probs(self, batch: PreferenceBatch, generic: Sequence[bool]) -> list[PairLogProbs]:
        """Score a batch's completions once for each entry of `generic`; see `PersonalizedLM.policy_log_probs`."""
        users = self._users_of(batch)
        every = torch.arange(len(batch), device=users.rows.device)
        first, of_pair = self._distinct(batch) if any(generic) else (every, every)
        rows = [first if g else every for g in generic]
        soft_prompt = SoftPrompt.cat_batch(
            [self.user_model.generic(users).select(first) if g else self.user_model(users) for g in generic]
        )
        index = torch.cat(rows)
        scored = self._scored(batch, index, soft_prompt)
        ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
        places = [torch.arange(end - len(r), end, device=index.device) for r, end in zip(rows, ends, strict=True)]
        return [scored.select(place[of_pair] if g else place) for place, g in zip(places, generic, strict=True)]

    def compute(self, batch: PreferenceBatch, every_term: bool, sampled: bool) -> tuple[Tensor, list[Term]]:
        """Compute the alpha-weighted loss of each pair, and the terms; see `PersonalizedLM.objective`."""
        # Scored first, while no graph is held, and shown to the loss last, so that no row is judged by its own batch.
        observes = self.loss.requires_mismatched and self.loss.training
        mismatched = self._mismatched_log_ratios(batch) if observes else None
        losses, terms = self._compute(batch, every_term, sampled)
        auxiliary = self.policy.auxiliary_loss()
        if auxiliary is not None:  # of all rows together, so that each pair bears it once
            losses = losses + auxiliary
        if mismatched is not None:
            self.loss.observe(mismatched)
        return losses, terms

    @property
    def _weights(self) -> dict[bool, float]:
        """The weight of the user's own term, and of the generic one if there is one."""
        return {False: self.alpha, True: 1.0 - self.alpha} if self.user_model.personalizes else {False: 1.0}

    def _compute(self, batch: PreferenceBatch, every_term: bool, sampled: bool) -> tuple[Tensor, list[Term]]:
        if sampled and self.user_model.personalizes:
            drawn = self._sampled_log_probs(batch, torch.rand(len(batch)) >= self.alpha)
            reference = self.reference_log_probs(batch)
            output = self.loss(drawn, reference)
            return output.losses, [Term(False, drawn, output, reference)]
        weights = self._weights
        kinds = [generic for generic, weight in weights.items() if weight > 0 or every_term]
        reference = self.reference_log_probs(batch)
        scored = self.policy_log_probs(batch, kinds)
        terms = [
            Term(g, policy, self.loss(policy, reference), reference) for g, policy in zip(kinds, scored, strict=True)
        ]
        # P-DPO, arXiv:2402.05133: mixed pair by pair, before any mean over a batch.
        losses = torch.stack([weights[term.generic] * term.output.losses for term in terms]).sum(0)
        return losses, terms

    def _sampled_log_probs(self, batch: PreferenceBatch, generic: Tensor) -> PairLogProbs:
        """Score each pair once: under the generic user where `generic` `[B]` says so, else under its own user.

        Args:
            batch: B pairs.
            generic: On the host, so that nobody waits for a device to count.
        """
        users = self._users_of(batch)
        order = to_device(generic.int().argsort(stable=True), users.rows.device)
        own, others = (users.select(rows) for rows in order.tensor_split([int((~generic).sum())]))
        soft_prompt = SoftPrompt.cat_batch([self.user_model(own), self.user_model.generic(others)])
        return self._scored(batch, order, soft_prompt).select(order.argsort())

    def _scored(self, batch: PreferenceBatch, rows: Tensor, soft_prompt: SoftPrompt) -> PairLogProbs:
        """Score the pairs that `rows` `[N]` names under the policy, each with its own of N soft prompts."""
        completions = [part.select(rows) for part in self._completions(batch)]
        return self._pair(
            self.policy.log_probs(batch.prompt.select(rows), completions, soft_prompt), batch.desirable[rows]
        )

    def _distinct(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Find the distinct pairs of a batch, whoever judged them.

        Returns:
            The first row of each distinct pair `[U]`, and for each row the number of its pair `[B]`.
        """
        # Not the judged ones, by which a thumbs-up and a thumbs-down of the same completion would be one.
        completions = self._completions(batch) if self.loss.feedback != "thumbs" else [batch.chosen, batch.rejected]
        parts = [batch.prompt, *completions, *([batch.user_text] if self.user_model.uses_text else [])]
        content = torch.cat([part.ids.masked_fill(~part.mask, -1) for part in parts], dim=1)
        _, of_pair = torch.unique(content, dim=0, return_inverse=True)
        rows = torch.arange(len(batch), device=content.device)
        first = rows.new_full((int(of_pair.max()) + 1,), len(batch)).scatter_reduce(0, of_pair, rows, "amin")
        return first, of_pair

    def _completions(self, batch: PreferenceBatch) -> list[Tokens]:
        """Return what is scored of each row."""
        if self.loss.feedback == "pairs":
            return [batch.chosen, batch.rejected]
        return [batch.completion if self.loss.feedback == "thumbs" else batch.chosen]

    def _pair(self, scores: Sequence[LogProbs], up: Tensor) -> PairLogProbs:
        """Put the scores of rows in their places, `up` `[B]` telling which rows of thumbs were liked."""
        if self.loss.feedback == "thumbs":
            (judged,) = scores
            return PairLogProbs(*(_where(kind[:, None], judged) for kind in (up, ~up)))
        nothing = LogProbs(scores[0].tokens[:, :0], scores[0].mask[:, :0])
        return PairLogProbs(scores[0], scores[1] if len(scores) > 1 else nothing)

    @torch.no_grad()
    def _mismatched_log_ratios(self, batch: PreferenceBatch) -> Tensor | None:
        """Return the log-ratios of completions to other prompts: each row's prompt, the completion of the row before.

        Returns:
            `[B]` means over the terms; `[0]` of a single row, which could only be matched with itself, and is scored
            all the same, as other processes may wait for this one.
        """
        chosen, rejected = (
            Tokens(part.ids.roll(1, 0), part.mask.roll(1, 0)) for part in (batch.chosen, batch.rejected)
        )
        mixed = replace(batch, chosen=chosen, rejected=rejected, reference=None, reference_keys=())
        reference = self.reference_log_probs(mixed)
        scored = self.policy_log_probs(mixed, [generic for generic, weight in self._weights.items() if weight > 0])
        if reference is None:
            return None
        ratios = [p.chosen.sum + p.rejected.sum - reference.chosen.sum - reference.rejected.sum for p in scored]
        return torch.stack(ratios).mean(0)[: len(batch) if len(batch) > 1 else 0]


def _where(kept: Tensor, scores: LogProbs) -> LogProbs:
    """Return scores with the rows that `kept` `[B, 1]` leaves out empty."""
    return LogProbs(torch.where(kept, scores.tokens, 0.0), scores.mask & kept)
