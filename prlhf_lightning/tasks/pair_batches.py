"""Pairs as one batch, for tasks that learn users from a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf_lightning.data import FileSource
from prlhf_lightning.data.collate import collate
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import PreferenceBatch


def read_pairs(
    model: PersonalizedLM, path: Path, settings: TokenizationSettings, anyone: bool = False
) -> tuple[PreferenceBatch, list[str]]:
    """Read and tokenise a file of pairs.

    Args:
        model: Whose tokenizer is used.
        path: A file of any format that training reads.
        settings: How texts became ids in training.
        anyone: Whether rows may do without a user.

    Returns:
        The pairs, and where each stands in the file.
    """
    blank: Mapping[str, Any] = {"user_id": "anyone"} if anyone else {}
    wheres, rows = [], []
    for where, row in FileSource(path).rows("train"):
        wheres.append(where)
        rows.append({**blank, **row})
    if not rows:
        raise ConfigurationError(f"{path}: there is no row in it; give one pair or more.")
    found = to_batch(FeedbackTokenizer(model.policy.tokenizer, settings), rows, wheres)
    if found is None:
        raise ConfigurationError(f"{path}: in every row both completions are the same tokens once they are cut.")
    return found


def to_batch(
    tokenize: FeedbackTokenizer, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]
) -> tuple[PreferenceBatch, list[str]] | None:
    """Tokenise rows as one batch.

    Args:
        tokenize: The model's.
        rows: Rows that `parse_record` reads.
        wheres: Where each stands.

    Returns:
        The pairs and where each stands, without those that are dropped or ties; None where nothing is left.
    """
    records = [parse_record(row, where) for row, where in zip(rows, wheres, strict=True)]
    names = ("user_text", "prompt", "chosen", "rejected")
    kept = [
        (number, {"user_id": record.user_id, "record": number} | {f"{name}_ids": getattr(ids, name) for name in names})
        for number, (record, ids) in enumerate(zip(records, tokenize(records, wheres), strict=True))
        if ids is not None and not ids.tie
    ]
    return (collate([row for _, row in kept]), [wheres[number] for number, _ in kept]) if kept else None
