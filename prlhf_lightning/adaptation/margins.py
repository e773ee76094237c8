"""How much each user would prefer the chosen completion, and how that changes with the user's row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import LogProbs, PairLogProbs, PreferenceBatch, Tokens, Users


class Margins:
    """Reward margins of pairs as a function of rows of the user table, whatever the user model.

    Nothing of the model is changed. The reference's log-probs are computed once.

    Args:
        model: A trained model.
        pairs: N pairs.
        batch_size: Pairs in a pass of the policy; small ones keep a small model's activations in a CPU's cache.
    """

    def __init__(self, model: PersonalizedLM, pairs: PreferenceBatch, batch_size: int = 32) -> None:
        if model.loss.feedback != "pairs":
            raise ConfigurationError(
                f"adapt: {type(model.loss).__name__} takes {model.loss.feedback}, and users can be learned by a loss "
                "that ranks pairs only."
            )
        self._model, self._pairs, self._batch_size = model, pairs, batch_size
        self._tables = _row_tables(model)
        # Pairs of like length side by side, which saves the padding.
        lengths = pairs.prompt.mask.sum(1) + torch.maximum(pairs.chosen.mask.sum(1), pairs.rejected.mask.sum(1))
        self._order = lengths.argsort(stable=True)
        self._reference: PairLogProbs | None = self._score_reference() if model.loss.requires_reference else None

    def __call__(
        self, rows: Tensor, gradients: bool = False, only: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the margin of each pair, and its gradient by its user's row.

        Args:
            rows: `[N, p]` each pair's user as numbers of all tables side by side; `[p]` for the same user in all.
            gradients: Compute the gradients as well, at about the price of two more passes.
            only: `[N]` bool, the pairs that are wanted; the others' margins are 0.

        Returns:
            `[N]` margins, and `[N, p]` gradients or None.
        """
        rows = rows.expand(len(self._pairs), -1)
        margins, slopes = rows.new_zeros(len(rows)), torch.zeros_like(rows) if gradients else None
        order = self._order if only is None else self._order[only[self._order]]
        was_training = self._model.training
        self._model.eval()  # without dropout
        try:
            for index in torch.split(order, self._batch_size) if len(order) else ():
                margins[index], slope = self._chunk(index, rows[index], gradients)
                if slopes is not None and slope is not None:
                    slopes[index] = slope
        finally:
            self._model.train(was_training)
        return margins, slopes

    def _chunk(self, index: Tensor, rows: Tensor, gradients: bool) -> tuple[Tensor, Tensor | None]:
        model, n, chunk = self._model, len(index), trimmed(select_pairs(self._pairs, index))
        # Each pair has a row of its own, after the generic user's, so that one backward pass gives the gradient of
        # every margin apart.
        parts = torch.split(rows.detach(), [table[0].numel() for table in self._tables.values()], dim=1)
        own = {
            name: torch.cat([table.detach()[:1], part.reshape(n, *table.shape[1:]).to(table.dtype)])
            for part, (name, table) in zip(parts, self._tables.items(), strict=True)
        }
        for table in own.values():
            table.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            text = model.users(chunk.user_ids, chunk.user_text).text
            users = Users(torch.arange(1, n + 1, device=rows.device), text)
            prompt = functional_call(model.user_model, own, (users,))
            scored = PairLogProbs(*model.policy.log_probs(chunk.prompt, [chunk.chosen, chunk.rejected], prompt))
            chosen, rejected = model.loss.rewards(scored, self._reference_of(index, chunk))
            margins = chosen - rejected
        if not gradients:
            return margins, None
        found = torch.autograd.grad(margins.sum(), list(own.values()), allow_unused=True)
        dense = [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, own.values(), strict=True)]
        return margins.detach(), torch.cat([part[1:].flatten(1).float() for part in dense], dim=1)

    def _score_reference(self) -> PairLogProbs:
        pairs = self._pairs
        blocks = [pairs.chosen.mask.float() * 0, pairs.rejected.mask.float() * 0]
        for index in torch.split(self._order, self._batch_size) if len(self._order) else ():
            scored = self._model.reference_log_probs(trimmed(select_pairs(pairs, index)))
            assert scored is not None  # a loss that requires a reference gets one
            for block, part in zip(blocks, (scored.chosen, scored.rejected), strict=True):
                # As wide as the longer completion of the pair, of which the other's part is padding.
                width = min(block.shape[1], part.tokens.shape[1])
                block[index, :width] = part.tokens[:, :width]
        chosen, rejected = (LogProbs(b, t.mask) for b, t in zip(blocks, (pairs.chosen, pairs.rejected), strict=True))
        return PairLogProbs(chosen, rejected)

    def _reference_of(self, index: Tensor, chunk: PreferenceBatch) -> PairLogProbs | None:
        if self._reference is None:
            return None
        found = self._reference.select(index)
        widths = chunk.chosen.mask.shape[1], chunk.rejected.mask.shape[1]
        chosen, rejected = (
            LogProbs(part.tokens[:, :width], part.mask[:, :width])
            for part, width in zip((found.chosen, found.rejected), widths, strict=True)
        )
        return PairLogProbs(chosen, rejected)


def select_pairs(pairs: PreferenceBatch, rows: Tensor) -> PreferenceBatch:
    """Return the pairs that `rows` `[n]` names, with their users."""
    users = tuple(pairs.user_ids[row] for row in rows.tolist())
    return replace(pairs.select(rows), user_ids=users, reference_keys=())


def trimmed(batch: PreferenceBatch) -> PreferenceBatch:
    """Cut padding that no row of a batch needs."""

    def cut(tokens: Tokens) -> Tokens:
        width = int(tokens.mask.sum(1).max())
        return Tokens(tokens.ids[:, :width], tokens.mask[:, :width])

    return replace(
        batch,
        user_text=cut(batch.user_text),
        prompt=cut(batch.prompt),
        chosen=cut(batch.chosen),
        rejected=cut(batch.rejected),
    )


def table_rows(tables: Sequence[Tensor]) -> Tensor:
    """Return the rows of several tables side by side, `[n, p]` float32."""
    return torch.cat([table.detach().flatten(1).float() for table in tables], dim=1)


def _row_tables(model: PersonalizedLM) -> dict[str, Tensor]:
    by_id = {id(parameter): name for name, parameter in model.user_model.named_parameters()}
    tables = {by_id[id(table)]: table for table in model.user_model.row_tables()}
    if not tables:
        raise ConfigurationError(
            f"adapt: {type(model.user_model).__name__} has no rows of users, so there is nothing to learn of one."
        )
    return tables
