"""Split of a source's rows into training rows and evaluation rows of seen and unseen users."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch.utils.data import Dataset

from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.data.records import Columns, parse_user_id, spell_user_id
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.splits import Positions, SplitBy, held_out_users, split_train_validation
from prlhf_lightning.data.store import TokenizedSplit
from prlhf_lightning.data.streaming import StreamedRows
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.io import atomic_file, text_writer
from prlhf_lightning.utils.progress import counting

EvalStage: TypeAlias = Literal["validate", "test"]


class Pairs(Dataset[dict[str, Any]]):
    """A subset of the rows of a split, given by their positions `[n]`."""

    def __init__(self, split: TokenizedSplit, positions: Positions) -> None:
        self.split, self.positions = split, positions

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def lengths(self) -> Positions:
        """`[n]` tokens of each pair's longer sequence."""
        return self.split.lengths[self.positions]

    def where(self, record: int) -> str:
        """Return the location in the source of the row at a position of the split."""
        place: str = self.split.rows([record])[0]["where"]
        return place

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows; DataLoader calls this method for a batch."""
        return self.split.rows(self.positions[indices].tolist())


@dataclass
class SplitResult:
    """Training and evaluation rows of a source.

    Attributes:
        train: The training pairs, stored or streamed.
        vocabulary: Their users, sorted.
        evaluation: For each stage, its non-empty sets: pairs of `seen` users and of `unseen` users.
        remarks: Remarks on the split, for the summary.
    """

    train: Pairs | StreamedRows
    vocabulary: UserVocabulary
    evaluation: dict[EvalStage, dict[str, Pairs]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitConfig:
    """Settings of the split; the fields are arguments of `PreferenceDataModule`."""

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

    def divide(self, splits: Mapping[Split, TokenizedSplit]) -> SplitResult:
        """Split the rows of a source; it must have a `train` split."""
        data = splits["train"]
        if "validation" not in splits:
            return _evaluated(self._without_validation(data), splits)
        return _evaluated(self._with_own_validation(data), splits)

    def divide_stream(
        self, source: DataSource, census: UserCounts, splits: Mapping[Split, TokenizedSplit]
    ) -> SplitResult:
        """Split a source with streamed training rows: only users are held out.

        Args:
            source: Source of the training rows.
            census: Number of training rows of each user.
            splits: The evaluation rows.
        """
        user_ids = list(census.rows)
        mask = held_out_users(user_ids, self.unseen_user_fraction, self.seed)
        held_out = frozenset(user_id for user_id, out in zip(user_ids, mask, strict=True) if out)
        vocabulary = UserVocabulary(sorted(user_id for user_id in user_ids if user_id not in held_out))
        total, size = sum(census.rows.values()), sum(census.rows[user_id] for user_id in vocabulary.ids)
        if not size:
            raise ConfigurationError(f"All {len(user_ids):,} users were held out; lower unseen_user_fraction.")
        division = SplitResult(StreamedRows(source, vocabulary, held_out, size), vocabulary)
        if total > size:
            division.remarks.append(f"{total - size:,} train rows of {len(held_out):,} held-out users are not used")
        if "validation" not in splits:
            division.remarks.append("no rows to validate on: a stream holds out none; give a validation split")
        return _evaluated(division, splits)

    def _with_own_validation(self, data: TokenizedSplit) -> SplitResult:
        held_out = held_out_users(data.user_ids, self.unseen_user_fraction, self.seed)
        train = np.flatnonzero(~held_out[data.users])
        division = SplitResult(self._train_pairs(data, train), _vocabulary(data, train))
        if unused := len(data) - len(train):
            division.remarks.append(f"{unused:,} train rows of {held_out.sum():,} held-out users are not used")
        return division

    def _without_validation(self, data: TokenizedSplit) -> SplitResult:
        parts = split_train_validation(
            data.users,
            data.user_ids,
            data.keys(self.split_by),
            self.validation_fraction,
            self.unseen_user_fraction,
            self.seed,
        )
        division = SplitResult(self._train_pairs(data, parts.train), _vocabulary(data, parts.train))
        division.evaluation["validate"] = _non_empty(data, seen=parts.seen, unseen=parts.unseen)
        if parts.orphans:
            division.remarks.append(f"{parts.orphans:,} users have all their rows in validation and count as unseen")
        if self.validation_fraction and not len(parts.seen):
            division.remarks.append(self._why_none_of_seen_users(data, parts.train))
        prompts = data.keys("prompt")
        if shared := int(np.isin(prompts[parts.unseen], prompts[parts.train]).sum()):
            division.remarks.append(f"{shared:,} rows of unseen users are on prompts that are also in training")
        return division

    def _why_none_of_seen_users(self, data: TokenizedSplit, train: Positions) -> str:
        """Return why there are no validation rows of seen users, and the fix."""
        none = "no rows of seen users to validate on"
        if np.bincount(data.users[train]).max() == 1:
            return f"{none}: each of them has only one row, which is in training; collect more rows per user"
        kinds = len(np.unique(data.keys(self.split_by)[train]))
        if kinds == 1:
            fix = "set split_by: pair" if self.split_by == "prompt" else "collect others"
            return f"{none}: there is only one {self.split_by}, which is in training; {fix}"
        return (
            f"{none}: validation_fraction={self.validation_fraction} held out none of their {kinds:,} different "
            f"{self.split_by}s; raise it" + (", or set split_by: pair" if self.split_by == "prompt" else "")
        )

    def _train_pairs(self, data: TokenizedSplit, positions: Positions) -> Pairs:
        if not len(positions):
            raise ConfigurationError(
                f"All {len(data):,} training rows were held out. The data has "
                f"{len(np.unique(data.keys('prompt'))):,} different prompts and {len(data.user_ids):,} users; "
                "set split_by: pair, or lower validation_fraction or unseen_user_fraction."
            )
        return Pairs(data, positions)


def _vocabulary(data: TokenizedSplit, train: Positions) -> UserVocabulary:
    return UserVocabulary(sorted(data.user_ids[user] for user in np.unique(data.users[train])))


def _evaluated(division: SplitResult, splits: Mapping[Split, TokenizedSplit]) -> SplitResult:
    """Add the source's own splits for evaluation."""
    stages: dict[Split, EvalStage] = {"validation": "validate", "test": "test"}
    for split, stage in stages.items():
        if split in splits:
            division.evaluation[stage] = _by_acquaintance(splits[split], division.vocabulary)
    return division


def _by_acquaintance(data: TokenizedSplit, vocabulary: UserVocabulary) -> dict[str, Pairs]:
    """Split evaluation rows into those of seen and of unseen users."""
    seen = np.array([user_id in vocabulary for user_id in data.user_ids])[data.users]
    return _non_empty(data, seen=np.flatnonzero(seen), unseen=np.flatnonzero(~seen))


def _non_empty(data: TokenizedSplit, **sets: Positions) -> dict[str, Pairs]:
    return {name: Pairs(data, positions) for name, positions in sets.items() if len(positions)}


_FORMAT = 2  # increase it when the meaning of stored counts changes, so older ones are not read
_SHOWN_EVERY = 10_000  # rows
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserCounts:
    """Row counts of users.

    Attributes:
        rows: Number of rows of each user, in order of first appearance.
        texts: Number of rows with a text about the user.
    """

    rows: dict[str, int]
    texts: int


def count_users(source: DataSource, split: Split, folder: Path) -> UserCounts:
    """Return the user counts of a split of a source, from the cache in `folder` or by counting.

    Raises:
        FeedbackFormatError: A row has no valid user id, or there are no rows.
        ConfigurationError: The folder cannot be written.
    """
    parts = {
        "format": _FORMAT,
        "source": f"{type(source).__module__}.{type(source).__qualname__}",
        "fingerprint": source.fingerprint(split),
        "columns": dict(source.columns),
    }
    digest = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"users-{digest}.csv"
    if path.exists() and _sum_file(path).exists():
        if _sum_file(path).read_bytes() == _sum(path):
            return read_user_counts(path)
        _log.warning("The count of users %s is damaged. They are counted again.", path)
    census = count(source, split)
    try:
        _write(census, path)
    except OSError as error:
        _log.warning(
            "data.cache_dir is %s, where the count of users cannot be written (%s). It is made again at the next "
            "start; free space there, or set data.cache_dir (or the variable PRLHF_CACHE) to a folder that can be "
            "written.",
            folder, error,
        )  # fmt: skip
    return census


def count(source: DataSource, split: Split) -> UserCounts:
    """Count the rows of each user of a split, with a progress bar."""
    columns = Columns.from_mapping(source.columns)
    rows: dict[str, int] = {}
    texts = number = 0
    with counting(f"Counting the users of the {split} split") as progress:
        for number, (where, row) in enumerate(read(source, split), start=1):
            user_id = row.get(columns.user_id)
            if type(user_id) is str and user_id in rows:  # the usual case; otherwise the first row of a user
                rows[user_id] += 1
            else:
                rows[parse_user_id(row, where, columns)] = 1
            texts += row.get(columns.user_text) is not None
            if number % _SHOWN_EVERY == 0:
                progress.update(progress.task_ids[0], completed=number)
    if not number:
        raise FeedbackFormatError(f"The {split} split of {type(source).__name__} has no rows", "give it at least one")
    return UserCounts(rows, texts)


def read_user_counts(path: Path) -> UserCounts:
    """Read user counts from a CSV, JSON Lines or Parquet file with columns `user_id`, `rows` and optionally `texts`.

    Raises:
        FeedbackFormatError: The file has another format; the message names the row.
    """
    rows: dict[str, int] = {}
    texts = 0
    for where, row in read_rows(path):
        user_id = parse_user_id(spell_user_id(row, "user_id"), where)
        if user_id in rows:
            raise FeedbackFormatError("this user stands in the file twice", "give each user one row", where=where)
        rows[user_id] = _number(row.get("rows"), where, "rows", least=1)
        # Without the column `texts`, assume that all rows have a text.
        texts += rows[user_id] if row.get("texts") is None else _number(row["texts"], where, "texts", least=0)
    return UserCounts(rows, texts)


def _number(value: object, where: str, field: str, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if number < least:
        fix = f"write a whole number, at least {least}"
        raise FeedbackFormatError(f"is {value!r}", fix, field=field, where=where, kind="is no such number")
    return number


def _write(census: UserCounts, path: Path) -> None:
    with (
        atomic_file(path, shared=True) as file,
        text_writer(file) as text,
    ):  # processes that count at the same time write the same content
        writer = csv.writer(text)
        writer.writerow(["user_id", "rows", "texts"])
        writer.writerows(_lines(census))
    with atomic_file(_sum_file(path), shared=True) as file:
        file.write(_sum(path))


def _sum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sum(path: Path) -> bytes:
    """Return the checksum line in the format of `sha256sum`."""
    return f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()


def _lines(census: UserCounts) -> Iterable[tuple[str, int, int]]:
    left = census.texts  # only the total is ever used
    for user_id, rows in census.rows.items():
        texts = min(rows, left)
        left -= texts
        yield user_id, rows, texts
