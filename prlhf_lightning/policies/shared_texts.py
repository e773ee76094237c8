"""The distinct prompts and completions of a batch, so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.types import LogProbs, Tokens


@dataclass(frozen=True)
class SharedTexts:
    """The distinct prompts of N rows, and the distinct completions of each prompt.

    A user who ranks, rates or votes on m answers to a prompt gives up to m²/4 pairs of them. With all pairs of a user
    next to one another in a batch, the prompt and each answer need to be computed only once.

    Attributes:
        rows: `[U]` int64 a row with each distinct prompt.
        prompt_of: `[D]` int64 the prompt of each distinct completion.
        completions: D completions.
        number: `[n, N]` int64 the distinct completion of each row.
    """

    rows: Tensor
    prompt_of: Tensor
    completions: Tokens
    number: Tensor

    @classmethod
    def find(cls, prompts: Sequence[Tensor], completions: Sequence[Tokens]) -> SharedTexts:
        """Return what rows share.

        Args:
            prompts: Integers `[N, ...]` that together identify the prompt of each row, and who asks.
            completions: n batches of N completions.
        """
        rows, prompt_of_row = distinct(torch.cat([part.reshape(len(part), -1) for part in prompts], dim=1))
        both = Tokens.concat(completions)
        content = torch.cat([prompt_of_row.repeat(len(completions))[:, None], contents(both)], dim=1)
        first, number = distinct(content)
        return cls(rows, content[first, 0], both.select(first).trimmed(), number.view(len(completions), -1))

    def saved(self, positions: int) -> float:
        """Return the share of positions that need not be computed.

        Args:
            positions: Width of a prompt, with the soft prompt.
        """
        n, rows = self.number.shape
        width = self.completions.ids.shape[1]
        alone = rows * (positions + n * width)
        return 1 - (len(self.rows) * positions + len(self.completions) * width) / alone

    def of_rows(self, scores: LogProbs) -> tuple[LogProbs, ...]:
        """Return the scores of each of the n batches of N completions, given those of the D distinct ones."""
        return tuple(scores.select(number) for number in self.number)


def contents(tokens: Tokens) -> Tensor:
    """Return token ids `[N, L]` in which padding is -1."""
    return tokens.ids.masked_fill(~tokens.mask, -1)


def distinct(content: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first of each kind of equal rows `[U]`, and the kind of each row `[N]`."""
    _, kind = torch.unique(content, dim=0, return_inverse=True)
    rows = torch.arange(len(kind), device=kind.device)
    first = rows.new_full((int(kind.max()) + 1,), len(rows)).scatter_reduce(0, kind, rows, "amin")
    return first, kind
