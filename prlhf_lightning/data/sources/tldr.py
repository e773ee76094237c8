"""Data source of TL;DR summary comparisons by crowd workers (OpenAI, summarize-from-feedback)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, check_template, filled, left_out, original, unusable
from prlhf_lightning.data.sources.files import Paths
from prlhf_lightning.errors import ConfigurationError

Policies: TypeAlias = Literal["all", "supervised"]
Taste: TypeAlias = Literal["own", "length"]

_SCHEMA = Schema("a row of the summarize-from-feedback comparisons")
_SPLIT_OF: dict[str, Split] = {"train": "train", "valid1": "validation", "valid2": "validation"}


class _Comparison(NamedTuple):
    where: str
    worker: str
    supervised: bool
    row: Mapping[str, Any]


class TLDRSource(DerivedSource):
    """Comparisons of two summaries of a post by crowd workers, who are the users.

    Reads the original files (`comparisons/batch*.json`, JSON Lines with `info`, `summaries`, `choice`, `worker` and
    `split`: README of github.com/openai/summarize-from-feedback) or `openai/summarize_from_feedback` on the hub. The
    original's `valid1` and `valid2` are the validation split. All its workers are kept; those without training rows
    are the unseen users. Pairs of equal summaries, or with an empty one, are left out.

    The protocol of arXiv:2402.05133 (`data/tldr_dataset.ipynb` in github.com/HumainLab/Personalized_RLHF) is
    `policies: supervised, most_active: 10, taste: length`. Counts that its authors print for the full data, train and
    validation: 92,858 and 86,086 comparisons; 38,487 and 16,294 of supervised policies; 23,299 and 4,921 of these by
    the ten most active workers. These workers draw the tastes 0 0 0 1 1 1 0 0 0 0 (1: shorter), so "longer" is right on
    16,607 and 3,371. 11,373 validation comparisons are by unseen workers. After dropping equal summaries and pairs over
    4,800 characters, the authors have 23,292 and 16,294 pairs; here the data module limits lengths in tokens. For
    unseen workers with equally many train comparisons, the authors' order of drawing tastes depends on their sorting
    routine; here such workers are sorted by id.

    Args:
        files: The original files; without them the data set is loaded from the hub.
        hub: Name on the hub, or a local copy that `datasets` loads.
        revision: Branch, tag or commit on the hub. On its main branch the data set is a script, which `datasets` no
            longer runs, so the default is the hub's own conversion to Parquet (`comparisons/{train,validation}/*`).
        policies: `supervised` keeps comparisons in which supervised policies wrote both summaries: the policy's name
            contains "sup", but neither "ppo" nor "cnn".
        most_active: Train only on this many workers, those with the most comparisons in the train split.
        taste: `own` prefers the summary that the worker chose. `length` prefers the longer or the shorter summary, in
            characters; each worker draws one of these tastes, in the order of activity. Of equally long summaries, the
            first is preferred, as in the protocol.
        shorter_fraction: Probability that a worker draws the shorter one.
        taste_seed: Seed of these draws.
        post_format: Prompt for a post, with `{subreddit}`, `{title}` and `{post}`.
        article_format: Prompt for a news article (the data have a few), with `{title}` and `{article}`.

    Raises:
        FeedbackFormatError: A row is not in the original schema.
    """

    def __init__(
        self,
        files: Paths | None = None,
        hub: str = "openai/summarize_from_feedback",
        revision: str | None = "refs/convert/parquet",
        policies: Policies = "all",
        most_active: int | None = None,
        taste: Taste = "own",
        shorter_fraction: float = 0.3,
        taste_seed: int = 3456,
        post_format: str = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR: ",
        article_format: str = "TITLE: {title}\nPOST: {article}\nTL;DR: ",
    ) -> None:
        for name, value, allowed in (("policies", policies, Policies), ("taste", taste, Taste)):
            if value not in get_args(allowed):
                raise ConfigurationError(f"TLDRSource: {name} is {value!r}; it must be one of {get_args(allowed)}.")
        if most_active is not None and most_active < 1:
            raise ConfigurationError(f"TLDRSource: most_active is {most_active}; it must be at least 1.")
        if not 0 <= shorter_fraction <= 1:
            raise ConfigurationError(f"TLDRSource: shorter_fraction is {shorter_fraction}; it is from 0 to 1.")
        check_template("post_format", post_format, ("subreddit", "title", "post"))
        check_template("article_format", article_format, ("title", "article"))
        self._is_split_by_field = files is not None
        train, validation = (
            original(files, hub, split, revision=revision, data_files=f"comparisons/{split}/*")
            for split in ("train", "validation")
        )
        super().__init__(
            {"train": [train], "validation": [validation]},
            policies=policies,
            most_active=most_active,
            taste=(taste, shorter_fraction, taste_seed),
            formats=(post_format, article_format),
        )
        self.policies, self.most_active, self.taste = policies, most_active, taste
        self.shorter_fraction, self.taste_seed = shorter_fraction, taste_seed
        self.post_format, self.article_format = post_format, article_format

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the comparisons that the protocol keeps, with the preferred summary as `chosen`."""
        trained = set(self.ranking[: self.most_active]) if self.most_active and split == "train" else None
        for comparison in self._comparisons(split):
            if not self._is_kept(comparison):
                counts[left_out("not by supervised policies")] += 1
            elif trained is not None and comparison.worker not in trained:
                counts[left_out(f"not by the {self.most_active} most active workers")] += 1
            else:
                chosen, rejected = self._preference(comparison)
                if reason := unusable(chosen, rejected, "summaries"):
                    counts[left_out(reason)] += 1
                else:
                    prompt = self._prompt(comparison)
                    row = {"user_id": comparison.worker, "prompt": prompt, "chosen": chosen, "rejected": rejected}
                    yield comparison.where, row

    @cached_property
    def ranking(self) -> list[str]:
        """Workers sorted by number of kept train comparisons, most first, ties by id; validation-only workers last."""
        made = Counter(comparison.worker for comparison in self._comparisons("train") if self._is_kept(comparison))
        others = {comparison.worker for comparison in self._comparisons("validation") if self._is_kept(comparison)}
        return sorted(made.keys() | others, key=lambda worker: (-made[worker], worker))

    @cached_property
    def prefers_shorter(self) -> dict[str, bool]:
        """Whether each worker prefers the shorter summary."""
        draw = np.random.RandomState(self.taste_seed)  # the generator behind np.random.seed, as in the protocol
        weights = [1 - self.shorter_fraction, self.shorter_fraction]
        return {worker: bool(draw.choice([0, 1], p=weights)) for worker in self.ranking}

    def _comparisons(self, split: Split) -> Iterator[_Comparison]:
        for part in self._parts[split]:
            for where, row in part.rows():
                if self._is_split_by_field and self._split_of(row, where) != split:
                    continue
                names = [_SCHEMA.get(row, where, "summaries", i, "policy", kind=str) for i in (0, 1)]
                supervised = all("sup" in name and "ppo" not in name and "cnn" not in name for name in names)
                yield _Comparison(where, _SCHEMA.get(row, where, "worker", kind=str), supervised, row)

    def _split_of(self, row: Mapping[str, Any], where: str) -> Split:
        name = _SCHEMA.get(row, where, "split", kind=str)
        if name not in _SPLIT_OF:
            _SCHEMA.fail(where, ("split",), f"is none of {', '.join(_SPLIT_OF)}")
        return _SPLIT_OF[name]

    def _is_kept(self, comparison: _Comparison) -> bool:
        return comparison.supervised or self.policies == "all"

    def _preference(self, comparison: _Comparison) -> tuple[str, str]:
        where, row = comparison.where, comparison.row
        first, second = (_SCHEMA.get(row, where, "summaries", i, "text", kind=str) for i in (0, 1))
        if self.taste == "length":
            shorter = self.prefers_shorter[comparison.worker]
            first_wins = len(first) <= len(second) if shorter else len(first) >= len(second)
        else:
            choice = _SCHEMA.get(row, where, "choice", kind=int)
            if choice not in (0, 1):
                _SCHEMA.fail(where, ("choice",), f"is {choice}, neither 0 nor 1", "is neither 0 nor 1")
            first_wins = choice == 0
        return (first, second) if first_wins else (second, first)

    def _prompt(self, comparison: _Comparison) -> str:
        where, row = comparison.where, comparison.row
        info = _SCHEMA.get(row, where, "info", kind=dict)
        is_post = info.get("article") is None  # posts and articles have different fields, or nulls, as on the hub
        names = ("subreddit", "title", "post") if is_post else ("title", "article")
        values = {name: _SCHEMA.get(row, where, "info", name, kind=str) for name in names}
        return filled(self.post_format if is_post else self.article_format, values)
