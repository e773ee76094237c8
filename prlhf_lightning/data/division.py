"""Which rows of a source are trained on, and which evaluate seen and unseen users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch.utils.data import Dataset

from prlhf_lightning.data.cache import TokenizedSplit
from prlhf_lightning.data.census import Census
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.splits import Positions, SplitBy, held_out_users, split_train_validation
from prlhf_lightning.data.stream import StreamedRows
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError

EvalStage: TypeAlias = Literal["validate", "test"]


class Pairs(Dataset[dict[str, Any]]):
    """Some of the rows of a split, by their positions `[n]` in it."""

    def __init__(self, split: TokenizedSplit, positions: Positions) -> None:
        self.split, self.positions = split, positions

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def lengths(self) -> Positions:
        """`[n]` tokens of each pair's longer sequence."""
        return self.split.lengths[self.positions]

    def where(self, record: int) -> str:
        """Return where a row stands in the source, given its position in the split."""
        place: str = self.split.rows([record])[0]["where"]
        return place

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once, which is what a DataLoader asks for."""
        return self.split.rows(self.positions[indices].tolist())


@dataclass
class Division:
    """Which rows serve for what.

    Attributes:
        train: The training pairs, stored or streamed.
        vocabulary: Their users, sorted.
        evaluation: For each stage, its sets that are not empty: pairs by `seen` users and by `unseen` ones.
        remarks: What a user should know about how the rows were divided.
    """

    train: Pairs | StreamedRows
    vocabulary: UserVocabulary
    evaluation: dict[EvalStage, dict[str, Pairs]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HoldOut:
    """How much is held out of training; the fields are arguments of `PreferenceDataModule`."""

    validation_fraction: float
    unseen_user_fraction: float
    split_by: SplitBy
    seed: int

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "unseen_user_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it is a share, at least 0 and below 1.")
        if self.split_by not in get_args(SplitBy):
            raise ConfigurationError(f"split_by is {self.split_by!r}; it must be one of {get_args(SplitBy)}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed is {self.seed}; it must be at least 0 and below 2**63.")

    def divide(self, splits: Mapping[Split, TokenizedSplit]) -> Division:
        """Divide the rows of a source, whose `train` split must be there."""
        data = splits["train"]
        if "validation" not in splits:
            return _evaluated(self._without_validation(data), splits)
        return _evaluated(self._with_own_validation(data), splits)

    def divide_stream(self, source: DataSource, census: Census, splits: Mapping[Split, TokenizedSplit]) -> Division:
        """Divide the rows of a source whose training rows are streamed: all of them, but for held-out users.

        Args:
            source: Where the training rows come from.
            census: How many of them each user has.
            splits: The rows to evaluate on.
        """
        user_ids = list(census.rows)
        mask = held_out_users(user_ids, self.unseen_user_fraction, self.seed)
        held_out = frozenset(user_id for user_id, out in zip(user_ids, mask, strict=True) if out)
        vocabulary = UserVocabulary(sorted(user_id for user_id in user_ids if user_id not in held_out))
        total, size = sum(census.rows.values()), sum(census.rows[user_id] for user_id in vocabulary.ids)
        if not size:
            raise ConfigurationError(f"All {len(user_ids):,} users were held out; lower unseen_user_fraction.")
        division = Division(StreamedRows(source, vocabulary, held_out, size), vocabulary)
        if total > size:
            division.remarks.append(f"{total - size:,} train rows of {len(held_out):,} held-out users are not used")
        if "validation" not in splits:
            division.remarks.append("no rows to validate on, for a stream has none held out: name a validation split")
        return _evaluated(division, splits)

    def _with_own_validation(self, data: TokenizedSplit) -> Division:
        held_out = held_out_users(data.user_ids, self.unseen_user_fraction, self.seed)
        train = np.flatnonzero(~held_out[data.users])
        division = Division(self._train_pairs(data, train), _vocabulary(data, train))
        if unused := len(data) - len(train):
            division.remarks.append(f"{unused:,} train rows of {held_out.sum():,} held-out users are not used")
        return division

    def _without_validation(self, data: TokenizedSplit) -> Division:
        parts = split_train_validation(
            data.users,
            data.user_ids,
            data.keys(self.split_by),
            self.validation_fraction,
            self.unseen_user_fraction,
            self.seed,
        )
        division = Division(self._train_pairs(data, parts.train), _vocabulary(data, parts.train))
        division.evaluation["validate"] = _non_empty(data, seen=parts.seen, unseen=parts.unseen)
        if parts.orphans:
            division.remarks.append(f"{parts.orphans:,} users have all their rows in validation and count as unseen")
        if self.validation_fraction and not len(parts.seen):
            division.remarks.append(self._why_none_of_seen_users(data, parts.train))
        prompts = data.keys("prompt")
        if shared := int(np.isin(prompts[parts.unseen], prompts[parts.train]).sum()):
            division.remarks.append(f"{shared:,} rows of unseen users are on prompts that training meets too")
        return division

    def _why_none_of_seen_users(self, data: TokenizedSplit, train: Positions) -> str:
        """Return why all rows of the users who are trained on are trained on, and what would change that."""
        none = "no rows of seen users to validate on"
        if np.bincount(data.users[train]).max() == 1:
            return f"{none}, for each of them has one row only, which is trained on: gather more of each"
        kinds = len(np.unique(data.keys(self.split_by)[train]))
        if kinds == 1:
            fix = "set split_by: pair" if self.split_by == "prompt" else "gather others"
            return f"{none}, for there is one {self.split_by} only, which is trained on: {fix}"
        return (
            f"{none}, for validation_fraction={self.validation_fraction} held out none of their {kinds:,} different "
            f"{self.split_by}s: raise it" + (", or set split_by: pair" if self.split_by == "prompt" else "")
        )

    def _train_pairs(self, data: TokenizedSplit, positions: Positions) -> Pairs:
        if not len(positions):
            raise ConfigurationError(
                f"No training rows are left of {len(data):,}: all were held out. The data has "
                f"{len(np.unique(data.keys('prompt'))):,} different prompts and {len(data.user_ids):,} users; "
                "set split_by: pair, or lower validation_fraction or unseen_user_fraction."
            )
        return Pairs(data, positions)


def _vocabulary(data: TokenizedSplit, train: Positions) -> UserVocabulary:
    return UserVocabulary(sorted(data.user_ids[user] for user in np.unique(data.users[train])))


def _evaluated(division: Division, splits: Mapping[Split, TokenizedSplit]) -> Division:
    """Add the source's own splits for evaluation."""
    stages: dict[Split, EvalStage] = {"validation": "validate", "test": "test"}
    for split, stage in stages.items():
        if split in splits:
            division.evaluation[stage] = _by_acquaintance(splits[split], division.vocabulary)
    return division


def _by_acquaintance(data: TokenizedSplit, vocabulary: UserVocabulary) -> dict[str, Pairs]:
    """Divide evaluation rows by whether training meets their user."""
    seen = np.array([user_id in vocabulary for user_id in data.user_ids])[data.users]
    return _non_empty(data, seen=np.flatnonzero(seen), unseen=np.flatnonzero(~seen))


def _non_empty(data: TokenizedSplit, **sets: Positions) -> dict[str, Pairs]:
    return {name: Pairs(data, positions) for name, positions in sets.items() if len(positions)}
