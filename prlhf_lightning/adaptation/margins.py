"""How much each user would prefer the chosen completion, and how that changes with the user's row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import PairLogProbs, PreferenceBatch, Users


class Margins:
    """Reward margins of pairs as a function of rows of the user table, whatever the user model.

    Nothing of the model is changed. Reference log-probs are computed once.

    Args:
        model: A trained model.
        pairs: N pairs.
        batch_size: Pairs in a pass of the policy.
    """

    def __init__(self, model: PersonalizedLM, pairs: PreferenceBatch, batch_size: int = 128) -> None:
        self.model = model
        self._tables = _row_tables(model)
        if not model.loss.requires_rejected:
            raise ConfigurationError(
                f"adapt: {type(model.loss).__name__} takes no rejected completions, so that its model ranks none; "
                "users can be learned by a preference loss only."
            )
        # Pairs of like length side by side, which saves the padding.
        lengths = pairs.prompt.mask.sum(1) + torch.maximum(pairs.chosen.mask.sum(1), pairs.rejected.mask.sum(1))
        order = lengths.argsort(stable=True)
        self._chunks = [(rows, _trimmed(select_pairs(pairs, rows))) for rows in order.split(batch_size)]
        self._references: list[PairLogProbs | None] | None = None
        self.count = len(pairs)

    def __call__(self, rows: Tensor, gradients: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the margin of each pair, and its gradient by its user's row.

        Args:
            rows: `[N, p]` each pair's user as numbers of all tables side by side; `[p]` for the same user in all.
            gradients: Compute the gradients as well, at about the price of two more passes.

        Returns:
            `[N]` margins, and `[N, p]` gradients or None.
        """
        rows = rows.expand(self.count, -1)
        margins, slopes = rows.new_empty(self.count), torch.zeros_like(rows) if gradients else None
        if self._references is None:
            self._references = [self.model.reference_log_probs(chunk) for _, chunk in self._chunks]
        for (index, chunk), reference in zip(self._chunks, self._references, strict=True):
            found, slope = self._chunk(chunk, reference, rows[index], gradients)
            margins[index] = found
            if slopes is not None and slope is not None:
                slopes[index] = slope
        return margins, slopes

    def _chunk(
        self, chunk: PreferenceBatch, reference: PairLogProbs | None, rows: Tensor, gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        model, n = self.model, len(chunk)
        # Each pair has a row of its own, after the generic user's, so that one backward pass gives the gradient of
        # every margin apart.
        parts = rows.detach().split([table[0].numel() for table in self._tables.values()], dim=1)
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
            chosen, rejected = model.loss.rewards(scored, reference)
            margins = chosen - rejected
        if not gradients:
            return margins, None
        found = torch.autograd.grad(margins.sum(), list(own.values()), allow_unused=True)
        dense = [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, own.values(), strict=True)]
        return margins.detach(), torch.cat([part[1:].flatten(1).float() for part in dense], dim=1)


def _row_tables(model: PersonalizedLM) -> dict[str, Tensor]:
    wanted = {id(table) for table in model.user_model.row_tables()}
    tables = {name: p for name, p in model.user_model.named_parameters() if id(p) in wanted}
    if not tables:
        raise ConfigurationError(
            f"adapt: {type(model.user_model).__name__} has no rows of users, so there is nothing to learn of one."
        )
    return tables


def table_rows(tables: Sequence[Tensor]) -> Tensor:
    """Return the rows of several tables side by side, `[n, p]` float32."""
    return torch.cat([table.detach().flatten(1).float() for table in tables], dim=1)


def select_pairs(pairs: PreferenceBatch, rows: Tensor) -> PreferenceBatch:
    """Return the pairs that `rows` `[n]` names, with their users."""
    users = tuple(pairs.user_ids[row] for row in rows.tolist())
    return replace(pairs.select(rows), user_ids=users, reference_keys=())


def _trimmed(batch: PreferenceBatch) -> PreferenceBatch:
    """Cut padding that no row of a batch needs."""
    cut = {}
    for name in ("user_text", "prompt", "chosen", "rejected"):
        tokens = getattr(batch, name)
        width = int(tokens.mask.sum(1).max()) if len(tokens) else 0
        cut[name] = replace(tokens, ids=tokens.ids[:, :width], mask=tokens.mask[:, :width])
    return replace(batch, **cut)
