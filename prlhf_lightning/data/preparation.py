"""Prepared feedback of a source: tokenized or counted once, cached, and split into training and evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from prlhf_lightning.data.batching import PairsWithHistory, PromptDataset
from prlhf_lightning.data.holdout import Pairs, SplitConfig, SplitResult, UserCounts, count_users, read_user_counts
from prlhf_lightning.data.order import TrainingOrder
from prlhf_lightning.data.privacy import PseudonymousSource, Pseudonyms
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split, read
from prlhf_lightning.data.store import BuildReport, FeedbackCache, Ties, TokenizedSplit
from prlhf_lightning.data.streaming import FeedbackStream, StreamedRows
from prlhf_lightning.data.tokenization import FeedbackTokenizer, Overlong, TokenizationSettings
from prlhf_lightning.data.users import remark
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import Feedback
from prlhf_lightning.utils.chat_tokens import remember_end_tokens
from prlhf_lightning.utils.hub import loading

Stage: TypeAlias = Literal["train", "validate", "test", "predict"]


@dataclass(frozen=True, eq=False)
class PreparedFeedback:
    """Prepared data of a source; each part is created on first access. The fields are as in `PreferenceDataModule`."""

    source: DataSource
    tokenizer: PreTrainedTokenizerBase | str | None
    settings: TokenizationSettings
    hold_out: SplitConfig
    feedback: Feedback
    ties: Ties
    streaming: bool
    users_file: Path | None
    pseudonyms: Pseudonyms | None
    cache_dir: Path
    history_size: int

    @cached_property
    def dated_settings(self) -> TokenizationSettings:
        """The settings, with today's date if the chat template writes a date and none is set."""
        return self.settings.dated(self._loaded_tokenizer)

    @cached_property
    def splits(self) -> dict[Split, TokenizedSplit]:
        """The stored splits: all but the training split of a stream."""
        available = self.source.splits()
        if "train" not in available:
            raise ConfigurationError(
                f"{type(self.source).__name__} has no train split, which defines the users; give it one."
            )
        cache = FeedbackCache(
            self.cache_dir, self._loaded_tokenizer, self.dated_settings, self.feedback, self.ties, self.pseudonyms
        )
        stored = [split for split in SPLITS if split in available and not (self.streaming and split == "train")]
        return {split: cache.open(self.source, split) for split in stored}

    @cached_property
    def census(self) -> UserCounts:
        """The row counts of a stream's users."""
        if self.users_file is None:
            return count_users(self._streamed_source, "train", self.cache_dir)
        census = read_user_counts(self.users_file)
        return replace(census, rows={self.known_as(user_id): rows for user_id, rows in census.rows.items()})

    @cached_property
    def division(self) -> SplitResult:
        """The training and evaluation rows."""
        if self.streaming:
            splits = self.splits  # first, because it checks for a train split
            return self.hold_out.divide_stream(self._streamed_source, self.census, splits)
        return self.hold_out.divide(self.splits)

    @cached_property
    def with_history(self) -> PairsWithHistory | None:
        """The training pairs with histories; None if no histories are needed."""
        pairs = self.division.train
        if not self.history_size or not isinstance(pairs, Pairs):
            return None
        return PairsWithHistory(pairs, self.history_size, self.hold_out.seed)

    @cached_property
    def tokenize(self) -> FeedbackTokenizer:
        """The tokenizer of prompts; it wraps plain prompts in the chat template if the training rows use it."""
        wrapped = self.settings.chat_template or self.conversational
        return FeedbackTokenizer(self._loaded_tokenizer, replace(self.dated_settings, chat_template=wrapped))

    @cached_property
    def conversational(self) -> bool:
        """Whether most training rows are conversations instead of strings; for a stream, whether the first one is."""
        if not self.streaming:
            report = self.splits["train"].report
            return 2 * report.conversations > report.kept
        columns = Columns.from_mapping(self.source.columns)
        where, row = next(iter(read(self.source, "train")))
        return not isinstance(parse_record(row, where, columns, self.feedback).prompt, str)

    def known_as(self, user_id: str) -> str:
        """Return the id used here for the source's user `user_id`: a pseudonym, or the id itself."""
        return user_id if self.pseudonyms is None else self.pseudonyms(user_id)

    def evaluation(self, stage: Stage) -> Mapping[str, Pairs | PromptDataset]:
        """Return the non-empty sets of a stage, by name."""
        evaluation = self.division.evaluation
        if stage == "predict":
            return self._requests or evaluation.get("test") or evaluation.get("validate", {})
        return evaluation.get(stage, {}) if stage != "train" else {}

    def stream(self, rows: StreamedRows, sampler: Any) -> FeedbackStream:
        """Return a data set that reads and tokenizes streamed rows on the fly, in a sampler's order."""
        tokenize = FeedbackTokenizer(self._loaded_tokenizer, self.dated_settings)
        return FeedbackStream(rows, sampler.order, tokenize, self.feedback, drop_ties=self.ties == "drop")

    def longest_row(self) -> int:
        """Return the most tokens of a row of any split; for streamed rows the sum of the limits."""
        lengths = [int(data.lengths.max()) for data in self.splits.values()]
        if self.streaming:
            limits = self.settings
            text = limits.max_user_text_length if self.census.texts else 0
            lengths.append(text + limits.max_prompt_length + limits.max_completion_length)
        return max(lengths)

    def has_user_text(self) -> bool:
        """Return whether any row of any split has a text about its user."""
        streamed = self.streaming and self.census.texts > 0
        return streamed or any(data.report.user_texts for data in self.splits.values())

    def votes_by_user(self) -> dict[str, int]:
        """Return the number of training rows of each user."""
        train = self.division.train
        if isinstance(train, StreamedRows):
            return {user_id: self.census.rows[user_id] for user_id in train.vocabulary.ids}
        counts = np.bincount(train.split.users[train.positions], minlength=len(train.split.user_ids))
        return {user_id: count for user_id, count in zip(train.split.user_ids, counts.tolist(), strict=True) if count}

    @property
    def _streamed_source(self) -> DataSource:
        """The streamed source, with pseudonyms if these are used."""
        return self.source if self.pseudonyms is None else PseudonymousSource(self.source, self.pseudonyms)

    @cached_property
    def _loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ConfigurationError("PreferenceDataModule has no tokenizer; pass the policy's, or its path or name.")
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        path = str(Path(self.tokenizer).expanduser())
        with loading(path, "tokenizer", f"tokenizer: {self.tokenizer!r}", "give a folder with one, or a hub name."):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with suppress(OSError):  # a tokenizer folder may have no model
            remember_end_tokens(tokenizer, GenerationConfig.from_pretrained(path))
        return tokenizer

    @cached_property
    def _requests(self) -> dict[str, PromptDataset]:
        prompts = list(self.source.prompts())
        if not prompts:
            return {}
        places, texts = zip(*prompts, strict=True)
        return {"prompts": PromptDataset(places, self.tokenize.prompts(texts), self.division.vocabulary.ids)}


_NAMED = 6  # columns named in the summary


def summary(
    division: SplitResult,
    splits: Mapping[Split, TokenizedSplit],
    order: TrainingOrder,
    sequences: int,
    overlong: Overlong,
    counts: Mapping[str, int],
    feedback: Feedback,
) -> str:
    """Return a summary of the data, in one paragraph.

    Args:
        division: The training and evaluation rows.
        splits: The stored splits.
        order: Settings of the training batches.
        sequences: Sequences scored per row.
        overlong: Handling of rows over a length limit.
        counts: The source's counts for a stream.
        feedback: Kind of rows.
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
    division: SplitResult, order: TrainingOrder, sequences: int, counts: Mapping[str, int], feedback: Feedback
) -> Iterator[str]:
    rows = f"{len(division.train):,} training {feedback} by {len(division.vocabulary.ids):,} users"
    if not isinstance(division.train, Pairs):
        yield f"{rows}, streamed in blocks of {order.shuffle_buffer:,}"
        yield from (f"train: {count:,} {what}" for what, count in counts.items())
        return
    yield rows
    if len(division.vocabulary.ids) == 1:
        yield "only one user, so there is nothing to personalize"
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
        yield f"{report.token_ties:,} {split} rows left out (completions equal once tokenized and truncated)"
    for told, found in report.notes.items():
        yield f"{found.count:,} {split} rows: {told}"
    if unread := report.unread_columns:
        more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
        yield f"{split}: columns not read: {', '.join(map(repr, unread[:_NAMED]))}{more}"
    yield from (f"{split}: {count:,} {what}" for what, count in report.source.items())
