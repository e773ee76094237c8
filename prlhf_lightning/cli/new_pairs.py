"""Reading of pairs that stand beside a trained model: of new users, or of a pool to ask about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prlhf_lightning.data import DataSource
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError


def read_rows(
    tokenize: FeedbackTokenizer,
    source: DataSource,
    leave_out: Collection[str] = (),
    anyone: bool = False,
    left_out: set[str] | None = None,
    option: str = "feedback",
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the tokenized pairs of a source.

    Args:
        tokenize: The model's tokenizer.
        source: The source, of which the training split is read.
        leave_out: Users whose rows are skipped.
        anyone: Whether the user is optional.
        left_out: Collects the users whose rows were skipped.
        option: Name of the option, for messages.

    Returns:
        Rows as for `data.batching.collate`, and the file and line of each.

    Raises:
        ConfigurationError: There is no pair.
        FeedbackFormatError: A row is not a pair.
    """
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
    found = tokenized(tokenize, rows, wheres, columns)
    if not found[0]:
        raise ConfigurationError(
            f"{wheres[0]} and all other rows: both completions are the same tokens once they are cut."
        )
    return found


def tokenized(
    tokenize: FeedbackTokenizer,
    rows: Sequence[Mapping[str, Any]],
    wheres: Sequence[str],
    columns: Columns = Columns(),  # noqa: B008 - frozen, hence safe to share
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return tokenized rows, and their files and lines, without dropped rows and ties.

    Args:
        tokenize: The model's tokenizer.
        rows: Rows that `parse_record` reads.
        wheres: File and line of each.
        columns: The column of each field.
    """
    records = [parse_record(row, where, columns) for row, where in zip(rows, wheres, strict=True)]
    names = ("user_text", "prompt", "chosen", "rejected")
    kept = [
        (number, {"user_id": record.user_id, "record": number} | {f"{name}_ids": getattr(ids, name) for name in names})
        for number, (record, ids) in enumerate(zip(records, tokenize(records, wheres), strict=True))
        if ids is not None and not ids.tie
    ]
    return [row for _, row in kept], [wheres[number] for number, _ in kept]
