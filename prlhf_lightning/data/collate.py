"""Rows of token ids to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prlhf_lightning.types import PreferenceBatch, Tokens


def collate(rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
    """Pad rows on the right to the longest of the batch.

    Args:
        rows: Each with `user_id`, `record` and the ids `user_text_ids`, `prompt_ids`, `chosen_ids`, `rejected_ids`.
    """
    return PreferenceBatch(
        user_ids=tuple(row["user_id"] for row in rows),
        user_text=Tokens.from_lists([row["user_text_ids"] for row in rows]),
        prompt=Tokens.from_lists([row["prompt_ids"] for row in rows]),
        chosen=Tokens.from_lists([row["chosen_ids"] for row in rows]),
        rejected=Tokens.from_lists([row["rejected_ids"] for row in rows]),
        records=torch.tensor([row["record"] for row in rows], dtype=torch.long),
    )
