"""Rows of token ids to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens


def collate(rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
    """Pad rows on the right to the longest of the batch.

    Args:
        rows: Each with `user_id`, `record` and the ids `user_text_ids`, `prompt_ids`, `chosen_ids`, `rejected_ids`;
            all or none of them with a `history`, other rows of the same user.
    """
    return PreferenceBatch(
        user_ids=tuple(row["user_id"] for row in rows),
        user_text=Tokens.from_lists([row["user_text_ids"] for row in rows]),
        prompt=Tokens.from_lists([row["prompt_ids"] for row in rows]),
        chosen=Tokens.from_lists([row["chosen_ids"] for row in rows]),
        rejected=Tokens.from_lists([row["rejected_ids"] for row in rows]),
        records=torch.tensor([row["record"] for row in rows], dtype=torch.long),
        history=pair_tokens([row["history"] for row in rows]) if rows and "history" in rows[0] else None,
    )


def pair_tokens(histories: Sequence[Sequence[Mapping[str, Any]]]) -> PairTokens:
    """Pad users' rows, each with `chosen_ids` and `rejected_ids`, to the most rows and the longest completion."""
    size = max(map(len, histories), default=0)

    def block(name: str) -> Tokens:
        rows = [row for history in histories for row in [*(r[name] for r in history), *[[]] * (size - len(history))]]
        flat = Tokens.from_lists(rows)
        shape = len(histories), size, flat.ids.shape[1]
        return Tokens(flat.ids.view(shape), flat.mask.view(shape))

    return PairTokens(block("chosen_ids"), block("rejected_ids"))
