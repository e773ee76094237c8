"""How much each user would prefer the chosen completion, and how that changes with the user's row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from prlhf_lightning.adaptation.texts import DistinctTexts
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, SoftPrompt

# In a pass of the policy, for either completion of its pairs: keys, values and gradients of more might not fit.
_POSITIONS = 1 << 14


class Margins:
    """Reward margins of pairs as a function of rows of the user table, whatever the user model.

    Nothing of the model is changed. Texts that come more than once, and the reference's log-probs, are computed once.

    Args:
        model: A trained model.
        pairs: N pairs, on any device.
        batch_size: Pairs in a pass of the policy, fewer where they are long; few keep a small model's activations in a
            CPU's cache.
    """

    def __init__(self, model: PersonalizedLM, pairs: PreferenceBatch, batch_size: int = 32) -> None:
        if model.loss.feedback != "pairs":
            raise ConfigurationError(
                f"adapt: {type(model.loss).__name__} takes {model.loss.feedback}, and users can be learned by a loss "
                "that ranks pairs only."
            )
        self._tables = row_tables(model)
        self._device = next(iter(self._tables.values())).device
        self._texts = texts = DistinctTexts.of(pairs.to(self._device), model.user_model.uses_text)
        self._model, self._policy = model, model.policy.settled()
        longest = sum(part.mask.shape[1] for part in (texts.user_text, texts.prompt, texts.completion))
        self._batch_size = max(1, min(batch_size, _POSITIONS // max(1, longest)))
        every = torch.ones(len(texts.completion), dtype=torch.bool, device=self._device)
        with _evaluating(model):
            self._reference = self._log_probs(every, None) if model.loss.requires_reference else None

    def __call__(
        self, rows: Tensor, gradients: bool = False, only: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the margin of each pair, and its gradient by its user's row.

        Args:
            rows: `[N, p]` each pair's user as numbers of all tables side by side; `[p]` for the same user in all, which
                takes the less time the more pairs have a prompt or a completion in common.
            gradients: Compute the gradients as well, at about the price of two more passes.
            only: `[N]` bool, the pairs that are wanted; the others' margins are 0.

        Returns:
            `[N]` margins, and `[N, p]` gradients or None.
        """
        with _evaluating(self._model):
            return self._compute(rows, gradients, only)

    def _compute(self, rows: Tensor, gradients: bool, only: Tensor | None) -> tuple[Tensor, Tensor | None]:
        texts = self._texts
        count = len(texts.chosen)
        wanted = torch.ones(count, dtype=torch.bool, device=self._device) if only is None else only.to(self._device)
        index = wanted.nonzero().flatten()
        margins = rows.new_zeros(count)
        slopes = rows.new_zeros(count, rows.shape[-1]) if gradients else None
        if not len(index):
            return margins, slopes
        if rows.dim() == 1 and slopes is None:
            needed = torch.zeros(len(texts.completion), dtype=torch.bool, device=self._device)
            needed[texts.chosen[index]] = needed[texts.rejected[index]] = True
            scores = self._log_probs(needed, self._own_tables(rows[None]))
            margins[index] = self._margins(self._pair(scores, index), index)
            return margins, None
        rows = rows.expand(count, -1)
        # Pairs of like length side by side, which saves the padding.
        lengths = texts.completion.mask.sum(1)
        index = index[torch.maximum(lengths[texts.chosen[index]], lengths[texts.rejected[index]]).argsort(stable=True)]
        for some in torch.split(index, self._batch_size):
            margins[some], found = self._apart(some, rows[some], gradients)
            if slopes is not None and found is not None:
                slopes[some] = found
        return margins, slopes

    def _apart(self, index: Tensor, rows: Tensor, gradients: bool) -> tuple[Tensor, Tensor | None]:
        """Score pairs each under its own row."""
        texts = self._texts
        # Each pair has a row of its own, so that one backward pass gives the gradient of every margin apart.
        own = self._own_tables(rows)
        for table in own.values():
            table.requires_grad_(gradients)
        completions = [texts.completion.select(part[index]).trimmed() for part in (texts.chosen, texts.rejected)]
        places = torch.arange(1, len(index) + 1, device=self._device)
        with torch.set_grad_enabled(gradients):
            prompts = texts.prompt_of[texts.chosen[index]]
            visible = self._soft_prompt(prompts, own, places)
            scored = self._policy.log_probs(texts.prompt.select(prompts).trimmed(), completions, visible)
            margins = self._margins(PairLogProbs(*scored), index)
        if not gradients:
            return margins, None
        found = torch.autograd.grad(margins.sum(), list(own.values()), allow_unused=True)
        dense = [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, own.values(), strict=True)]
        return margins.detach(), torch.cat([part[1:].flatten(1).float() for part in dense], dim=1)

    @torch.no_grad()
    def _log_probs(self, wanted: Tensor, own: dict[str, Tensor] | None) -> LogProbs:
        """Score completions `[D]` under the only user of `own`, or under the reference; those not wanted get zeros."""
        texts = self._texts
        scores = torch.zeros(texts.completion.mask.shape, device=self._device)
        for completions in texts.groups(wanted, self._batch_size):
            prompts, prompt_of = torch.unique(texts.prompt_of[completions], return_inverse=True)
            found = (self._policy if own else self._model.policy).log_probs_of_each(
                texts.prompt.select(prompts).trimmed(),
                texts.completion.select(completions).trimmed(),
                prompt_of,
                self._soft_prompt(prompts, own, torch.ones_like(prompts)),
                reference=own is None,
                batch_size=2 * self._batch_size,
            )
            scores[completions, : found.tokens.shape[1]] = found.tokens
        return LogProbs(scores, texts.completion.mask)

    def _soft_prompt(self, prompts: Tensor, own: dict[str, Tensor] | None, places: Tensor) -> SoftPrompt | None:
        """Return what U prompts are conditioned on: users at `places` `[U]` of own tables; the reference's without."""
        text = self._texts.user_text.select(prompts).trimmed()
        users = self._model.users([""] * len(prompts), text, reference=own is None)
        if own is None:
            return self._model.user_model.reference(users)
        prompt: SoftPrompt = functional_call(self._model.user_model, own, (replace(users, rows=places),))
        return prompt

    def _own_tables(self, rows: Tensor) -> dict[str, Tensor]:
        """Return tables of the generic user's row and `rows` `[n, p]`, in which only the latter may be trained."""
        parts = torch.split(rows.detach(), [table[0].numel() for table in self._tables.values()], dim=1)
        return {
            name: torch.cat([table.detach()[:1], part.reshape(len(rows), *table.shape[1:]).to(table.dtype)])
            for part, (name, table) in zip(parts, self._tables.items(), strict=True)
        }

    def _pair(self, scores: LogProbs, index: Tensor) -> PairLogProbs:
        return PairLogProbs(scores.select(self._texts.chosen[index]), scores.select(self._texts.rejected[index]))

    def _margins(self, scored: PairLogProbs, index: Tensor) -> Tensor:
        """Return the margins `[n]` of the pairs that `index` names."""
        reference = self._pair(self._reference, index) if self._reference is not None else None
        chosen, rejected = self._model.loss.rewards(scored, reference)
        return chosen - rejected


@contextmanager
def _evaluating(model: PersonalizedLM) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def select_pairs(pairs: PreferenceBatch, rows: Tensor) -> PreferenceBatch:
    """Return the pairs that `rows` `[n]` names, with their users."""
    users = tuple(pairs.user_ids[row] for row in rows.tolist())
    return replace(pairs.select(rows), user_ids=users, reference_keys=())


def table_rows(tables: Sequence[Tensor]) -> Tensor:
    """Return the rows of several tables side by side, `[n, p]` float32."""
    return torch.cat([table.detach().flatten(1).float() for table in tables], dim=1)


def row_tables(model: PersonalizedLM) -> dict[str, Tensor]:
    """Return the tables of users' rows by their names in the user model, or raise where there are none."""
    by_id = {id(parameter): name for name, parameter in model.user_model.named_parameters()}
    tables = {by_id[id(table)]: table for table in model.user_model.row_tables()}
    if not tables:
        raise ConfigurationError(
            f"user_model: {type(model.user_model).__name__} has no rows of users, so there is nothing to learn of one."
        )
    return tables
