"""Data of online RL: the prompts of users, with all columns of their rows for the reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.batching import Loader
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.sampling import SequentialBatchSampler
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

_JUDGED = ("chosen", "rejected", "completion", "label", "response_a", "response_b", "winner")


class OnlineDataModule(PreferenceDataModule):
    """A `PreferenceDataModule` of which online RL uses the users and prompts; it does not train on the judged answers.

    An epoch has as many prompts as there are training rows, drawn by users in balance: with the default `balance` of 1
    all users have the same share, also those with few rows.

    Args:
        source: Source of the rows.
        balance: Sampling of users, from 0 (every training row once per epoch) to 1 (every user equally often).
        eval_prompts_per_user: Most prompts of a user in a validation; null for all. Each prompt counts once.
        kwargs: Other settings of `PreferenceDataModule`; `batch_size` is the number of prompts in a generation batch.
    """

    def __init__(
        self, source: DataSource, balance: float = 1.0, eval_prompts_per_user: int | None = 4, **kwargs: Any
    ) -> None:
        super().__init__(source, balance=balance, **kwargs)
        if self.streaming:
            raise ConfigurationError("Online RL needs stored rows: set data.streaming: false.")
        if eval_prompts_per_user is not None and eval_prompts_per_user < 1:
            raise ConfigurationError(
                f"data.eval_prompts_per_user is {eval_prompts_per_user}; it must be 1 or more, or null for all."
            )
        self.eval_prompts_per_user = eval_prompts_per_user

    def columns(
        self, records: Sequence[int], named: set[str], stage: Literal["train", "validate", "test"], number: int = 0
    ) -> dict[str, list[Any]]:
        """Return the prompts of rows, as `prompts`, and their other columns, for reward functions.

        Columns with judged answers are left out, unless they are named.

        Args:
            records: Numbers of rows, as in `PreferenceBatch.records`.
            named: Columns that a reward function names.
            stage: The rows' stage.
            number: Index of their dataloader in the stage.
        """
        pairs: Any = self._prepared.division.train
        if stage != "train":
            pairs = list(self._prepared.evaluation(stage).values())[number]
        (split,) = (name for name, data in self._prepared.splits.items() if data is pairs.split)
        kept = self._rows(split)
        rows = [kept[place["where"]] for place in pairs.split.rows(list(records))]
        columns = Columns.from_mapping(self.source.columns)
        judged = {getattr(columns, field) for field in _JUDGED} - named
        names = dict.fromkeys(name for _, row in rows for name in row if name not in judged)
        others = {name: [row.get(name) for _, row in rows] for name in names if name not in ("prompts", columns.prompt)}
        return {**others, "prompts": [prompt for prompt, _ in rows]}

    @cache  # noqa: B019 - it lives as long as the data module, which is used once in a process
    def _rows(self, split: Split) -> Mapping[str, tuple[Any, Mapping[str, Any]]]:
        """Return prompt and columns of all rows of a split, by their location."""
        columns, kept = Columns.from_mapping(self.source.columns), {}
        for where, row in read(self.source, split):
            try:
                prompt = parse_record(row, where, columns, self.feedback).prompt
            except FeedbackFormatError:  # such as a tie, which is not among the stored rows
                continue
            kept[str(where)] = (prompt, dict(row))
        return kept

    def _evaluation_loaders(self, stage: Any) -> list[Loader]:
        if stage == "predict":
            return super()._evaluation_loaders(stage)
        loaders = []
        for pairs in self._prepared.evaluation(stage).values():
            assert isinstance(pairs, Pairs)
            some = self._of_each_user(pairs)
            loaders.append(self._loader(some, SequentialBatchSampler(len(some), self.eval_batch_size)))
        return loaders

    def _of_each_user(self, pairs: Pairs) -> Pairs:
        """Return the first rows of each user on different prompts."""
        keys = pairs.split.keys("prompt")[pairs.positions]
        users = pairs.split.users[pairs.positions]
        _, first = np.unique(np.stack([users, keys], 1), axis=0, return_index=True)
        first = np.sort(first)
        if self.eval_prompts_per_user is None:
            return Pairs(pairs.split, pairs.positions[first])
        order = np.argsort(users[first], kind="stable")
        by_user = first[order]
        starts = np.flatnonzero(np.diff(users[by_user], prepend=-1))
        place = np.arange(len(by_user)) - np.repeat(starts, np.diff(starts, append=len(by_user)))
        return Pairs(pairs.split, pairs.positions[np.sort(by_user[place < self.eval_prompts_per_user])])
