"""Pairs as one batch, for tasks that learn users from a few of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prlhf_lightning.adaptation.margins import check_ranks_pairs
from prlhf_lightning.data import DataSource
from prlhf_lightning.data.collate import collate
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import PreferenceBatch


def read_pairs(
    model: PersonalizedLM,
    source: DataSource,
    leave_out: Collection[str] = (),
    anyone: bool = False,
    left_out: set[str] | None = None,
    option: str = "feedback",
) -> tuple[PreferenceBatch, list[str]]:
    """Read and tokenise the pairs of a source.

    Args:
        model: Texts become ids as they did in its training.
        source: Its rows of training are read.
        leave_out: Users whose rows are passed over.
        anyone: Whether rows may do without a user.
        left_out: Takes up the users whose rows were passed over.
        option: What the user called the source, for messages.

    Returns:
        The pairs, and where each stands.

    Raises:
        ConfigurationError: There is no pair, or the model was trained on feedback of another kind.
        FeedbackFormatError: A row is no pair.
    """
    check_ranks_pairs(model)  # before rows are said to lack what such a model has no use for
    columns = Columns.from_mapping(source.columns)
    blank: Mapping[str, Any] = {columns.user_id: "anyone"} if anyone else {}
    unwanted, passed_over = frozenset(leave_out), set[str]() if left_out is None else left_out
    wheres, rows = [], []
    for where, row in source.rows("train"):
        user_id = row.get(columns.user_id)
        if isinstance(user_id, str) and user_id in unwanted:
            passed_over.add(user_id)
        else:
            wheres.append(where)
            rows.append({**blank, **row})
    if not rows:
        whose = " of a new user" if passed_over else ""
        raise ConfigurationError(f"{option}: there is no row{whose} in it; give one pair or more.")
    found = to_batch(FeedbackTokenizer(model.policy.tokenizer, model.tokenization), rows, wheres, columns)
    if found is None:
        raise ConfigurationError(
            f"{wheres[0]} and all other rows: both completions are the same tokens once they are cut."
        )
    return found


def to_batch(
    tokenize: FeedbackTokenizer,
    rows: Sequence[Mapping[str, Any]],
    wheres: Sequence[str],
    columns: Columns = Columns(),  # noqa: B008 - frozen, hence safe to share
) -> tuple[PreferenceBatch, list[str]] | None:
    """Tokenise rows as one batch.

    Args:
        tokenize: The model's.
        rows: Rows that `parse_record` reads.
        wheres: Where each stands.
        columns: The column of each field.

    Returns:
        The pairs and where each stands, without those that are dropped or ties; None where nothing is left.
    """
    records = [parse_record(row, where, columns) for row, where in zip(rows, wheres, strict=True)]
    names = ("user_text", "prompt", "chosen", "rejected")
    kept = [
        (number, {"user_id": record.user_id, "record": number} | {f"{name}_ids": getattr(ids, name) for name in names})
        for number, (record, ids) in enumerate(zip(records, tokenize(records, wheres), strict=True))
        if ids is not None and not ids.tie
    ]
    return (collate([row for _, row in kept]), [wheres[number] for number, _ in kept]) if kept else None
