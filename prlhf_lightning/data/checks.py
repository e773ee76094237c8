"""Everything that is wrong with the rows of a source, and not the first thing alone.

Rows are judged as the data module judges them, so what is found here is what would stop a run or make it worse. Memory
holds hashes of rows and the users' ids, never texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.columns import UnreadColumns
from prlhf_lightning.data.problems import Problem, Problems, Severity
from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Columns, FeedbackRecord, Text, TieError, parse_record
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.data.special_tokens import ControlTokens
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.data.store import Ties
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings, TokenizedRecord
from prlhf_lightning.data.users import from_pandas, has_hidden_characters, look_alikes, stands_for_nobody
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.types import Feedback
from prlhf_lightning.utils.progress import counted

_BATCH = 1000  # rows tokenized together
_UNLIMITED = 1 << 60
_TIE = "equal completions"
_NO_WINNER = "winner: is a tie"
_SHOWN = 4  # ids that look alike that are named together


@dataclass
class SplitCounts:
    """What became of the rows of a split.

    Attributes:
        rows: Rows that were read, broken ones included: `accepted + ties + too_long + rejected`.
        accepted: Rows that can be trained on.
        ties: Rows whose completions are equal, as they stand or once tokenized and cut.
        too_long: Rows over a limit, where such rows are dropped.
        rejected: Rows with errors.
        users: Users of the accepted rows.
        prompts: Different prompts of the accepted rows.
        left_out: What the source itself left out by its protocol, by reason (`DataSource.counts`).
        unread_columns: Columns that no field is read from, the first few of them.
        unread: Where reading had to stop short of the end; what follows is not in the counts.
    """

    rows: int = 0
    accepted: int = 0
    ties: int = 0
    too_long: int = 0
    rejected: int = 0
    users: int = 0
    prompts: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    unread_columns: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a source.

    Attributes:
        splits: Counts of each split.
        problems: What is wrong, by kind.
    """

    splits: dict[Split, SplitCounts]
    problems: Problems

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.problems.count("error")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        splits = {split: asdict(counts) for split, counts in self.splits.items()}
        return {"ok": self.ok, "splits": splits, "problems": self.problems.as_list()}


class _Item(NamedTuple):
    number: int
    where: str
    record: FeedbackRecord


class _Finding(NamedTuple):
    """Rows that are wrong only beside others; their places are looked up when all are known."""

    kind: str
    split: Split
    matches: Matches
    partner_split: Split
    problem: str
    fix: str


@dataclass
class Inspector:
    """Checks every row of a source.

    Attributes:
        source: Where the rows come from.
        feedback: What rows are: pairs, thumbs or demonstrations (see `parse_record`).
        ties: Whether rows with equal completions are errors, or left out.
        min_votes: Users with fewer training rows are told.
        examples: How many problems of each kind are kept.
        tokenizer: Measures the rows, if there is one.
        settings: What the rows are measured by; `overlong` says whether a row over a limit is an error.
    """

    source: DataSource
    feedback: Feedback = "pairs"
    ties: Ties = "error"
    min_votes: int = 5
    examples: int = 5
    tokenizer: PreTrainedTokenizerBase | None = None
    settings: TokenizationSettings = field(default_factory=TokenizationSettings)

    def __call__(self) -> Report:
        """Read all splits and return what was found.

        Raises:
            ConfigurationError: The source cannot be found, or its settings are wrong.
        """
        self._control = ControlTokens(self.tokenizer)
        self._columns = Columns.from_mapping(self.source.columns)
        self._problems = Problems(self.examples)
        splits = [split for split in SPLITS if split in self.source.splits()]
        counts = {split: SplitCounts() for split in splits}
        judgments = {split: self._read(split, counts[split]) for split in splits}
        self._place([*self._within(judgments), *self._between(judgments)])
        self._count_users(judgments)
        self._compare_ids(judgments)
        return Report(counts, self._problems)

    def _read(self, split: Split, counts: SplitCounts) -> PairIndex:
        judgments = PairIndex()
        items = self._records(split, counts)
        for item in items if self.tokenizer is None else self._measured(items, split, counts, self.tokenizer):
            judgments.add(item.number, item.record)
        counts.accepted, counts.users = len(judgments), len(judgments.users)
        counts.prompts = judgments.distinct("prompt")
        counts.left_out = self.source.counts(split)
        return judgments

    def _records(self, split: Split, counts: SplitCounts) -> Iterator[_Item]:
        unread = UnreadColumns(self._columns.named())
        counts.unread_columns = unread.names
        for number, (where, row) in enumerate(counted(self.source.scan(split), f"Checking the {split} split")):
            if isinstance(row, Unreadable):
                problem = Problem.of(split, where, row.error)
                self._problems.add("error", problem, row.error.kind)
                if row.rest:
                    counts.unread.append(problem.place)
                else:
                    counts.rows += 1
                    counts.rejected += 1
                continue
            counts.rows += 1
            unread.add(row)
            try:
                record = parse_record(row, where, self._columns, self.feedback)
            except TieError as error:
                self._tie(Problem.of(split, where, error), counts)
            except PRLHFError as error:
                self._reject(split, where, error, counts)
            else:
                for note in (*record.notes, *self._control.notes(record)):
                    problem = Problem.at(split, where, note.problem, note.fix, note.field)
                    self._problems.add("warning", problem, note.kind)
                yield _Item(number, where, record)

    def _tie(self, problem: Problem, counts: SplitCounts) -> None:
        counts.ties += 1
        kind = _NO_WINNER if problem.field == "winner" else _TIE
        self._problems.add("error" if self.ties == "error" else "warning", problem, kind)

    def _reject(self, split: Split, where: str, error: PRLHFError, counts: SplitCounts) -> None:
        counts.rejected += 1
        self._problems.add("error", Problem.of(split, where, error), error.kind)

    def _measured(
        self, items: Iterator[_Item], split: Split, counts: SplitCounts, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[_Item]:
        """Yield the rows that can be tokenized, and tell those over a limit."""
        settings, free = self.settings, _UNLIMITED
        limits = {"max_prompt_length": free, "max_completion_length": free, "max_user_text_length": free}
        whole = replace(settings, **limits, overlong="error")  # type: ignore[arg-type]
        tokenize = FeedbackTokenizer(tokenizer, whole)
        while batch := list(islice(items, _BATCH)):
            for item, ids in zip(batch, _tokenized(tokenize, batch), strict=True):
                if isinstance(ids, PRLHFError):
                    self._reject(split, item.where, ids, counts)
                elif self._fits(item, ids, split, counts):
                    yield item

    def _fits(self, item: _Item, ids: TokenizedRecord, split: Split, counts: SplitCounts) -> bool:
        settings = self.settings
        over = False
        for name, named, part in zip(ids._fields, ("user_text", "prompt", *item.record.fields), ids, strict=True):
            setting, limit = settings.limit(name)
            if len(part) > limit:
                over = True
                done = {"truncate": "cut", "drop": "left out", "error": "refused"}[settings.overlong]
                what = f"has {len(part)} tokens, limit {limit}"
                problem = Problem.at(split, item.where, what, f"raise {setting}, or shorten it", named)
                severity: Severity = "error" if settings.overlong == "error" else "warning"
                self._problems.add(severity, problem, f"{named}: over {setting}={limit}, {done}")
        if over and settings.overlong != "truncate":
            counts.rejected += settings.overlong == "error"
            counts.too_long += settings.overlong == "drop"
            return False
        most = settings.max_completion_length
        if len(ids.rejected) and np.array_equal(ids.chosen[:most], ids.rejected[:most]):
            what = f"equals 'rejected' once tokenized and cut to {most} tokens"
            fix = "raise max_completion_length, use another tokenizer, or drop the row"
            self._tie(Problem.at(split, item.where, what, fix, "chosen"), counts)
            return False
        return True

    def _within(self, judgments: dict[Split, PairIndex]) -> Iterator[_Finding]:
        for split, rows in judgments.items():
            yield _Finding(
                f"duplicate judgment in {split}", split, rows.duplicates(self.examples), split,
                "repeats the judgment of its user at {}", "drop one of them, unless it was made twice",
            )  # fmt: skip
            yield _Finding(
                f"contradictory judgments in {split}", split, rows.contradictions(self.examples), split,
                "prefers the opposite of what its user prefers at {}",
                "drop both if neither is right; a model learns nothing from the two",
            )  # fmt: skip

    def _between(self, judgments: dict[Split, PairIndex]) -> Iterator[_Finding]:
        for first, later in combinations(judgments, 2):
            for by in ("judgment", "pair", "prompt"):
                leaked = judgments[later].leaked(judgments[first], by, self.examples)
                what = "user, prompt and completions" if by == "judgment" else f"{by}"
                yield _Finding(
                    f"same {by} in {first} and {later}", later, leaked, first,
                    f"has the same {what} as {{}} of {first}",
                    f"drop it here, or leave {later} out and let the data module hold out prompts or pairs (split_by)",
                )  # fmt: skip

    def _place(self, findings: Iterable[_Finding]) -> None:
        """Read as much as is needed again, to say where the rows of findings stand: they were kept as numbers."""
        findings = [finding for finding in findings if finding.matches.count]
        numbers: dict[Split, set[int]] = {}
        for finding in findings:
            numbers.setdefault(finding.split, set()).update(finding.matches.rows.tolist())
            numbers.setdefault(finding.partner_split, set()).update(finding.matches.partners.tolist())
        places = {(split, n): where for split, wanted in numbers.items() for n, where in self._places(split, wanted)}
        for kind, split, matches, partner_split, problem, fix in findings:
            for row, partner in zip(matches.rows.tolist(), matches.partners.tolist(), strict=True):
                here, there = (places.get(key, "(gone since)") for key in ((split, row), (partner_split, partner)))
                self._problems.add("warning", Problem.at(split, here, problem.format(there), fix), kind)
            self._problems.add_unseen("warning", kind, matches.count - len(matches.rows))

    def _places(self, split: Split, numbers: set[int]) -> Iterator[tuple[int, str]]:
        if numbers:
            again = counted(islice(self.source.scan(split), max(numbers) + 1), f"Looking up rows of the {split} split")
            for number, (where, _) in enumerate(again):
                if number in numbers:
                    yield number, where

    def _count_users(self, judgments: dict[Split, PairIndex]) -> None:
        trained = judgments.get("train")
        if trained is None:
            return
        for user_id, votes in trained.users.items():
            if votes < self.min_votes:
                problem = Problem(
                    "train", None, None, "user_id", f"{user_id!r} has {votes} judgment{'s' * (votes != 1)}",
                    "gather more, or expect little beyond the generic user",
                )  # fmt: skip
                self._problems.add("warning", problem, f"user with fewer than {self.min_votes} judgments")
        for split, rows in judgments.items():
            for user_id in [user_id for user_id in rows.users if user_id not in trained.users]:
                problem = Problem(
                    split, None, None, "user_id", f"{user_id!r} has no judgment in train",
                    "only the generic user serves such users; nothing to do if that is meant",
                )  # fmt: skip
                self._problems.add("warning", problem, f"user of {split} who is not in train")

    def _compare_ids(self, judgments: dict[Split, PairIndex]) -> None:
        """Tell ids that may be one person's, or nobody's, in any of the splits."""
        of_id: dict[str, dict[Split, int]] = {}
        for split, rows in judgments.items():
            for user_id, votes in rows.users.items():
                of_id.setdefault(user_id, {})[split] = votes

        def tell(user_ids: Sequence[str], problem: str, fix: str, kind: str) -> None:
            shown = [
                f"{one!r} ({', '.join(f'{n:,} in {split}' for split, n in of_id[one].items())})" for one in user_ids
            ]
            split = next(iter(of_id[user_ids[0]]))
            text = f"{' and '.join(shown[:_SHOWN])}{' and others' * (len(shown) > _SHOWN)} {problem}"
            self._problems.add("warning", Problem(split, None, None, "user_id", text, fix), kind)

        for group in look_alikes(of_id):
            tell(group, "look alike", "spell them in one way if they are one person", "user ids that look alike")
        for user_id in filter(stands_for_nobody, of_id):
            fix = "drop or fill these rows, or else they count as one person's"
            tell([user_id], "reads like a missing value", fix, "user id that reads like a missing value")
        for user_id in filter(has_hidden_characters, of_id):
            tell(
                [user_id],
                "has spaces around it or invisible characters",
                "remove them",
                "user id with hidden characters",
            )
        if from_pandas(of_id):
            what = "and all other ids end in .0, as pandas writes whole numbers of a column with gaps"
            fix = "read the column as strings, so that ids are those of other files"
            tell(list(of_id)[:1], what, fix, "user ids that end in .0")


def _tokenized(tokenize: FeedbackTokenizer, batch: list[_Item]) -> list[TokenizedRecord | PRLHFError]:
    """Tokenize rows together, and in ever smaller parts where one of them cannot be."""
    try:
        rows = tokenize([item.record for item in batch], [item.where for item in batch])
        return [row for row in rows if row is not None]  # none is: no row is over an unlimited length
    except PRLHFError as error:
        half = len(batch) // 2
        return _tokenized(tokenize, batch[:half]) + _tokenized(tokenize, batch[half:]) if half else [error]


_Rows = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Matches:
    """Rows that belong to earlier ones.

    Attributes:
        count: How many there are.
        rows: `[n]` the first of them, as numbers of rows in the order of the split.
        partners: `[n]` for each the earliest row that it belongs to.
    """

    count: int
    rows: _Rows
    partners: _Rows


@dataclass
class PairIndex:
    """The judgments of a split.

    Attributes:
        users: Number of judgments of each user, in order of appearance.
    """

    users: dict[str, int] = field(default_factory=dict)
    _rows: array[int] = field(default_factory=lambda: array("Q"))
    _prompts: array[int] = field(default_factory=lambda: array("Q"))
    _pairs: array[int] = field(default_factory=lambda: array("Q"))
    _judged: array[int] = field(default_factory=lambda: array("Q"))
    _sides: array[int] = field(default_factory=lambda: array("B"))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int, record: FeedbackRecord) -> None:
        """Add the judgment in the row of a number."""
        prompt, chosen, rejected = (_key(text) for text in (record.prompt, record.chosen, record.rejected))
        pair = _mixed(prompt, *sorted((chosen, rejected)))  # the same whoever won
        self.users[record.user_id] = self.users.get(record.user_id, 0) + 1
        self._rows.append(row)
        self._prompts.append(prompt)
        self._pairs.append(pair)
        self._judged.append(_mixed(pair, text_key(record.user_id)))
        self._sides.append(chosen > rejected)

    def duplicates(self, most: int) -> Matches:
        """Return judgments that their user has made before: the same prompt, chosen and rejected."""
        _, first, group = np.unique(self._ballots(), return_index=True, return_inverse=True)
        again = np.flatnonzero(first[group] != np.arange(len(self)))
        return self._found(again, first[group[again]], most)

    def contradictions(self, most: int) -> Matches:
        """Return judgments whose opposite their user has made before; each user and pair once."""
        _, first = np.unique(self._ballots(), return_index=True)
        first.sort()
        _, earliest, group = np.unique(_array(self._judged)[first], return_index=True, return_inverse=True)
        later = np.flatnonzero(earliest[group] != np.arange(len(first)))
        return self._found(first[later], first[earliest[group[later]]], most)

    def leaked(self, training: PairIndex, by: str, most: int) -> Matches:
        """Return judgments on what stands in training too, each with the first row of training that it stands in.

        Args:
            training: The judgments trained on.
            by: `prompt`; `pair`, the prompt with both completions; or `judgment`, a pair with its user.
            most: Up to how many are returned.
        """
        there, first = np.unique(training._by(by), return_index=True)
        mine = self._by(by)
        if not len(there):
            return Matches(0, *2 * [np.empty(0, np.int64)])
        place = np.minimum(np.searchsorted(there, mine), len(there) - 1)
        found = np.flatnonzero(there[place] == mine)
        rows = training._found(first[place[found]], first[place[found]], most).rows
        return Matches(len(found), _array(self._rows)[found[:most]].astype(np.int64), rows)

    def distinct(self, by: str) -> int:
        """Return the number of different prompts, pairs or judgments."""
        return len(np.unique(self._by(by)))

    def _by(self, by: str) -> _Keys:
        return _array({"prompt": self._prompts, "pair": self._pairs, "judgment": self._judged}[by])

    def _ballots(self) -> _Keys:
        """`[n]` hash of user, pair and the side that was chosen."""
        return _array(self._judged) ^ (_array(self._sides).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def _found(self, places: _Rows, partners: _Rows, most: int) -> Matches:
        rows = _array(self._rows)
        return Matches(len(places), *(rows[which[:most]].astype(np.int64) for which in (places, partners)))


def _array(values: array[int]) -> _Keys:
    return np.array(values, dtype=values.typecode)


def _key(text: Text | None) -> int:
    return 0 if text is None else text_key(text)


def _mixed(*keys: int) -> int:
    raw = b"".join(key.to_bytes(8, "little") for key in keys)
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")
