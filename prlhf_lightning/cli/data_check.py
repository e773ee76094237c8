"""The command `data check`: all problems of feedback at once, before a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.checks import Inspector, Report
from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.sources.files import FileSource, Paths
from prlhf_lightning.data.store import Ties
from prlhf_lightning.data.tokenization import Overlong, TokenizationSettings
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import Feedback
from prlhf_lightning.utils.io import atomic_write_bytes, check_output
from prlhf_lightning.utils.terminal import printable


def check(
    train: Paths | None = None,
    validation: Paths | None = None,
    test: Paths | None = None,
    columns: dict[str, str] | None = None,
    source: DataSource | None = None,
    feedback_type: Feedback = "pairs",
    ties: Ties = "error",
    min_votes: int = 5,
    tokenizer: str | None = None,
    max_prompt_length: int = 512,
    max_completion_length: int = 512,
    max_user_text_length: int = 256,
    overlong: Overlong = "truncate",
    chat_template: bool = False,
    user_text_format: str = "{user_text}\n",
    chat_template_args: dict[str, Any] | None = None,
    examples: int = 5,
    output: Path | None = None,
) -> None:
    """Check every row of feedback and report all problems; exits with 1 if there is any error.

    Errors would stop a run. Warnings are duplicate and contradictory judgments, users with few judgments, rows over a
    token limit, and overlap between training and evaluation.

    Args:
        train: Training file or files: JSON Lines, JSON, CSV (each also gzipped) or Parquet.
        validation: Validation file or files.
        test: Test file or files.
        columns: Mapping of fields to column names, such as `{user_id: worker}`.
        source: A source instead of files, as for `fit --data.source`.
        feedback_type: Kind of rows: pairs, thumbs (KTOLoss, ...) or demonstrations (SFTLoss).
        ties: Whether rows with equal completions are an error, or dropped, as for `fit --data.ties`.
        min_votes: Users with fewer training rows are reported.
        tokenizer: Model whose tokenizer measures the rows, as for `fit --model.policy.model`; without one, lengths are
            not checked.
        max_prompt_length: Maximum tokens of a prompt, as for `fit --data.max_prompt_length`.
        max_completion_length: Maximum tokens of a completion.
        max_user_text_length: Maximum tokens of the text about a user.
        overlong: Whether rows over a limit are truncated, dropped, or an error.
        chat_template: Whether plain strings use the tokenizer's chat template.
        user_text_format: Format of the text about a user before the prompt.
        chat_template_args: Further arguments of the chat template, such as `{enable_thinking: false}`.
        examples: Number of examples of each kind of problem.
        output: JSON file for the report.
    """
    for name, value in (("examples", examples), ("min_votes", min_votes)):
        if value < 0:
            raise ConfigurationError(f"{name} is {value}; it must be at least 0.")
    if output is not None:
        check_output(output, "output")
    limits = (max_prompt_length, max_completion_length, max_user_text_length)
    inspector = Inspector(
        the_source(train, validation, test, columns, source),
        feedback_type,
        ties,
        min_votes,
        examples,
        None if tokenizer is None else _tokenizer_of(tokenizer),
        TokenizationSettings(*limits, overlong, chat_template, user_text_format, chat_template_args or {}),
    )
    report = inspector()
    if output is not None:
        atomic_write_bytes(output, dumps(report.as_dict(), indent=1).encode() + b"\n")
    print(described(report))
    sys.exit(0 if report.ok else 1)


def _tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    from prlhf_lightning.policies import CausalLMPolicy  # takes seconds, and nothing else here needs it

    return CausalLMPolicy(model).tokenizer


def described(report: Report) -> str:
    """Return a report as text."""
    lines = []
    for split, counts in report.splits.items():
        parts = {"ties": counts.ties, "too long": counts.too_long, "rejected": counts.rejected}
        rows = "".join(f" + {count:,} {what}" for what, count in parts.items() if count or what != "too long")
        lines.append(
            f"{split}: {counts.rows:,} rows = {counts.accepted:,} accepted{rows}; {counts.users:,} users, "
            f"{counts.prompts:,} prompts"
        )
        lines += [f"  {count:,} {what}" for what, count in counts.left_out.items()]
        if split == "train" and counts.users == 1:
            lines.append("  only one user, so there is nothing to personalize: collect judgments of others")
        if counts.unread_columns:
            lines.append(f"  columns not read: {printable(', '.join(map(repr, counts.unread_columns)))}")
            if "system" in counts.unread_columns:
                lines.append("    to put 'system' before the prompt, set columns: {system: system}")
        lines += [f"  reading stopped at {where}; the rest is unread" for where in counts.unread if counts.rows]
    for group in report.problems:
        lines.append(f"\n{group.severity}: {printable(group.kind)} ({group.count:,})")
        lines += [f"  {printable(str(problem))}" for problem in group.examples]
        if len(group.examples) < group.count:
            lines.append(f"  ... and {group.count - len(group.examples):,} more")
    errors, warnings = (report.problems.count(severity) for severity in ("error", "warning"))
    lines.append(f"\nErrors: {errors:,}. Warnings: {warnings:,}.")
    return "\n".join(lines)


def the_source(
    train: Paths | None,
    validation: Paths | None,
    test: Paths | None,
    columns: Mapping[str, str] | None,
    source: DataSource | None,
) -> DataSource:
    """Return the source from files or from `source`.

    Raises:
        ConfigurationError: Neither or both are given.
    """
    by_files = any(value is not None for value in (train, validation, test, columns))
    if source is not None:
        if by_files:
            raise ConfigurationError("source: give either files (train, validation, test, columns) or a source.")
        return source
    if train is None:
        raise ConfigurationError("train: give a file, as in `--train votes.jsonl`, or a source, as in `--source ...`.")
    return FileSource(train, validation, test, columns)
