"""What is trained and evaluated on, in one paragraph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from prlhf_lightning.data.cache import BuildReport, TokenizedSplit
from prlhf_lightning.data.division import Division, Pairs
from prlhf_lightning.data.look_alikes import remark
from prlhf_lightning.data.order import TrainingOrder
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.tokenization import Overlong
from prlhf_lightning.types import Feedback

_NAMED = 6  # columns that are named


def summary(
    division: Division,
    splits: Mapping[Split, TokenizedSplit],
    order: TrainingOrder,
    sequences: int,
    overlong: Overlong,
    counts: Mapping[str, int],
    feedback: Feedback,
) -> str:
    """Return the paragraph.

    Args:
        division: Which rows serve for what.
        splits: The splits that are stored.
        order: How training rows are batched.
        sequences: Sequences that a row is scored as.
        overlong: What was done with rows over a limit.
        counts: What the source counted of a stream.
        feedback: What the rows are.
    """
    parts = [*_training(division, order, sequences, counts, feedback)]
    for stage, sets in division.evaluation.items():
        sizes = [f"{len(pairs):,} by {name} users" for name, pairs in sets.items()]
        parts.append(f"{feedback} to {stage} on: {' and '.join(sizes) or 'none'}")
    for split, data in splits.items():
        parts += _kept(split, data.report, overlong)
    ids = chain(division.vocabulary.ids, *(data.user_ids for data in splits.values()))
    if alike := remark(ids):
        parts.append(alike)
    return "Data: " + "; ".join(parts + division.remarks) + "."


def _training(
    division: Division, order: TrainingOrder, sequences: int, counts: Mapping[str, int], feedback: Feedback
) -> Iterator[str]:
    rows = f"{len(division.train):,} training {feedback} by {len(division.vocabulary.ids):,} users"
    if not isinstance(division.train, Pairs):
        yield f"{rows}, streamed in blocks of {order.shuffle_buffer:,}"
        yield from (f"train: {count:,} {what}" for what, count in counts.items())
        return
    yield rows
    if len(division.vocabulary.ids) == 1:
        yield "one user only, so there is nothing to personalize"
    if limit := order.max_row_tokens(sequences):
        alone = int((division.train.lengths > limit).sum())
        if alone:
            yield f"{alone:,} of them alone exceed max_tokens_per_batch={order.max_tokens_per_batch}"


def _kept(split: Split, report: BuildReport, overlong: Overlong) -> Iterator[str]:
    if report.user_texts:
        yield f"{report.user_texts:,} {split} rows with a text about the user"
    done = "left out" if overlong == "drop" else "truncated"
    for name, excess in report.excess.items():
        yield f"{excess.count:,} {split} rows {done} ('{name}' too long)"
    if report.ties:
        yield f"{report.ties:,} {split} rows left out (equal completions)"
    if report.token_ties:
        yield f"{report.token_ties:,} {split} rows left out (completions equal once tokenised and truncated)"
    for note, found in report.notes.items():
        yield f"{found.count:,} {split} rows: {note.partition('; ')[0]}"
    if unread := report.unread_columns:
        more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
        yield f"{split}: columns not read: {', '.join(map(repr, unread[:_NAMED]))}{more}"
    yield from (f"{split}: {count:,} {what}" for what, count in report.source.items())
