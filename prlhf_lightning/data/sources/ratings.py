"""Data sources that turn ratings and rankings into pairs, and labels into thumbs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from prlhf_lightning.data.columns import Schema, all_missing
from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Columns, Text, spell_user_id
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.sources.derived import DerivedSource, Part, left_out
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


class _Judged(NamedTuple):
    """User and prompt of a judgment; `key` identifies the prompt."""

    user_id: str
    key: str
    prompt: Text
    user_text: str | None


class _OfColumns(DerivedSource):
    """Base class: pairs from rows with configurable column names."""

    fields: tuple[str, ...] = ()
    needed: int
    schema: Schema

    def __init__(self, raw: DataSource, columns: Mapping[str, str] | None, pairing: Pairing, **settings: Any) -> None:
        names = {**raw.columns, **(columns or {})}
        known = ("user_id", "prompt", *self.fields, "user_text")
        if unknown := sorted(names.keys() - set(known)):
            raise ConfigurationError(f"columns: there is no field {unknown[0]!r}; the fields are {', '.join(known)}.")
        self._names = {field: names.get(field, field) for field in known}
        self._asks_for_text = "user_text" in names
        self._pairing = pairing
        parts: dict[Split, list[Part]] = {split: [Part(raw, split)] for split in raw.splits()}
        super().__init__(parts, names=sorted(names.items()), pairing=pairing, **settings)

    def _judged(self, row: Mapping[str, Any], where: str) -> _Judged:
        missing = {name: self._names[name] for name in ("user_id", "prompt", *self.fields[: self.needed])}
        missing = {name: column for name, column in missing.items() if column not in row}
        if len(missing) > 1:
            raise all_missing(where, missing, list(row))
        row = spell_user_id(row, self._names["user_id"])
        user_id = self.schema.get(row, where, self._names["user_id"], kind=str)
        prompt = self._text(row, where, "prompt")
        text: str | None = None
        if self._asks_for_text or row.get("user_text") is not None:
            column = self._names["user_text"]
            text = self.schema.get(row, where, column, kind=str) if row.get(column, "") is not None else None
        return _Judged(user_id, prompt if isinstance(prompt, str) else json.dumps(prompt), prompt, text)

    def _text(self, row: Mapping[str, Any], where: str, field: str) -> Text:
        """Return a string, or a conversation, which is validated later with the pair."""
        column = self._names[field]
        value = row.get(column)
        return value if isinstance(value, list) else self.schema.get(row, where, column, kind=str)

    def _rows(
        self, judged: _Judged, rated: Sequence[Rated], counts: Counter[str]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for pair in self._pairing(rated, json.dumps([judged.user_id, judged.key]), counts):
            yield (
                _place(pair),
                {
                    "user_id": judged.user_id,
                    "prompt": judged.prompt,
                    "chosen": pair.chosen.completion,
                    "rejected": pair.rejected.completion,
                    "user_text": judged.user_text,
                },
            )


def _place(pair: Pair) -> str:
    chosen, rejected = pair.chosen.where, pair.rejected.where
    return chosen if chosen == rejected else f"{chosen} and {rejected}"


class RatingSource(_OfColumns):
    """Turns ratings into pairs of completions that one user rated differently.

    A row is one rating: `user_id`, `prompt`, `completion`, `rating` (a number), and optionally `user_text`. Rows may
    be in any order, so all are held in memory. Pairs are formed for each user and prompt, in the order of their first
    rows. Equal ratings form no pair and are counted.

    Args:
        raw: Source of the rows, such as a `FileSource` or a `HubSource`.
        columns: Column names that differ from the field names, such as `{completion: joke, rating: stars}`.
        min_gap: Smallest difference between the two ratings of a pair.
        max_pairs: Most pairs per user and prompt, drawn at random; all by default.
        pairs: `all` pairs, or only those of `adjacent` ratings.
        higher_is_better: Whether a higher rating is better; false for ranks, where 1 is the best.
        seed: Seed of the pairs that `max_pairs` keeps.

    Raises:
        FeedbackFormatError: A field is missing, or a rating is not a finite number.
    """

    fields = ("completion", "rating")
    needed = 2
    schema = Schema("a rating", "name the column that holds it with columns, mend the row, or drop it")

    def __init__(
        self,
        raw: DataSource,
        columns: Mapping[str, str] | None = None,
        min_gap: float = 0.0,
        max_pairs: int | None = None,
        pairs: Which = "all",
        higher_is_better: bool = True,
        seed: int = 0,
    ) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        super().__init__(raw, columns, Pairing(pairs, min_gap, max_pairs, seed), sign=self._sign)

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of each user and prompt."""
        groups: dict[tuple[str, str], tuple[_Judged, list[Rated]]] = {}
        for part in self._parts[split]:
            for where, row in part.rows():
                judged = self._judged(row, where)
                score = self._sign * self.schema.number(row, where, self._names["rating"])
                _, rated = groups.setdefault((judged.user_id, judged.key), (judged, []))
                rated.append(Rated(self._text(row, where, "completion"), score, where))
        for judged, rated in groups.values():
            yield from self._rows(judged, rated, counts)


class RankingSource(_OfColumns):
    """Turns rankings of several completions into pairs.

    A row is one ranking: `user_id`, `prompt`, `completions` (a list, the best first), and optionally `user_text`. With
    tied completions, `ranks` gives the rank of each completion, in the same order; the lowest is the best, and the
    completions need not be sorted. If each rank is in its own row, use `RatingSource` with `higher_is_better: false`.

    Args:
        raw: Source of the rows, such as a `FileSource` or a `HubSource`.
        columns: Column names that differ from the field names, such as `{completions: answers}`.
        pairs: Only pairs of `adjacent` ranks, or `all` pairs; a ranking of n completions has n(n-1)/2 pairs.
        max_pairs: Most pairs per ranking, drawn at random; all by default.
        seed: Seed of the pairs that `max_pairs` keeps.

    Raises:
        FeedbackFormatError: A field is missing, or the numbers of ranks and completions differ.
    """

    fields = ("completions", "ranks")
    needed = 1
    schema = Schema("a ranking", "name the column that holds it with columns, mend the row, or drop it")

    def __init__(
        self,
        raw: DataSource,
        columns: Mapping[str, str] | None = None,
        pairs: Which = "adjacent",
        max_pairs: int | None = None,
        seed: int = 0,
    ) -> None:
        self._asks_for_ranks = "ranks" in {**raw.columns, **(columns or {})}
        super().__init__(raw, columns, Pairing(pairs, 0.0, max_pairs, seed))

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of each ranking."""
        for part in self._parts[split]:
            for where, row in part.rows():
                yield from self._rows(self._judged(row, where), self._ranking(row, where), counts)

    def _ranking(self, row: Mapping[str, Any], where: str) -> list[Rated]:
        schema, name = self.schema, self._names["completions"]
        texts = schema.get(row, where, name, kind=list)
        if len(texts) < 2:
            schema.fail(where, (name,), "has fewer than two completions, which is no ranking")
        completions: list[Text] = [
            text if isinstance(text, list) else schema.get(row, where, name, i, kind=str)
            for i, text in enumerate(texts)
        ]
        ranks = self._names["ranks"]
        if row.get(ranks) is None and not self._asks_for_ranks:
            return ranked(completions, where)
        if len(schema.get(row, where, ranks, kind=list)) != len(completions):
            problem = f"must hold one place for each of the {len(completions)} completions"
            schema.fail(where, (ranks,), problem, "must hold one place for each completion")
        places = [schema.number(row, where, ranks, i) for i in range(len(completions))]
        return [Rated(text, -place, where) for text, place in zip(completions, places, strict=True)]


Label: TypeAlias = str | bool | int | float


class LabelSource(DataSource):
    """Turns labels of any kind into thumbs, for losses of unpaired feedback.

    Give the labels, such as `up: [great, good], down: [bad]`, or thresholds, such as `up_from: 4, down_to: 2` for stars
    from 1 to 5. Numbers between the thresholds are left out and counted. (Words such as good and bad, up and down, like
    and dislike, and 1 and 0 or 1 and -1 need no `LabelSource`.)

    Args:
        raw: Source of the rows, such as a `FileSource` or a `HubSource`; its `columns` give the label's column.
        up: Labels that mean a thumbs-up.
        down: Labels that mean a thumbs-down.
        up_from: Smallest number that means a thumbs-up.
        down_to: Largest number that means a thumbs-down; by default every number below `up_from`.

    Raises:
        ConfigurationError: Neither labels nor thresholds are given, or they contradict one another.
    """

    def __init__(
        self,
        raw: DataSource,
        up: Sequence[Label] = (),
        down: Sequence[Label] = (),
        up_from: float | None = None,
        down_to: float | None = None,
    ) -> None:
        self.raw = raw
        self.columns = raw.columns
        self._up, self._down = ({_spelled(label) for label in labels} for labels in (up, down))
        self._up_from, self._down_to = up_from, down_to
        self._left_out: Counter[Split] = Counter()
        if both := sorted(self._up & self._down):
            raise ConfigurationError(f"LabelSource: {both[0]!r} is both in up and in down; leave it out of one.")
        if up_from is None and (down_to is not None or not self._up or not self._down):
            raise ConfigurationError(
                "LabelSource: give labels, as in up: [great, good], down: [bad], or a threshold, as in up_from: 4."
            )
        if up_from is not None and down_to is not None and down_to >= up_from:
            raise ConfigurationError(f"LabelSource: down_to is {down_to} and up_from {up_from}; it must be below that.")

    def splits(self) -> set[Split]:
        """Return the splits of the raw source."""
        return self.raw.splits()

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the raw rows with the label true or false, without rows that are neither up nor down."""
        self._left_out[split] = 0
        for where, row in read(self.raw, split):
            if (labeled := self._labeled(where, row, split)) is not None:
                yield where, labeled

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield the same as `rows`; continue after errors."""
        self._left_out[split] = 0
        for where, row in self.raw.scan(split):
            if isinstance(row, Unreadable):
                yield where, row
                continue
            try:
                labeled = self._labeled(where, row, split)
            except FeedbackFormatError as error:
                yield where, Unreadable(error, dict(row))
                continue
            if labeled is not None:
                yield where, labeled

    def fingerprint(self, split: Split) -> str:
        """Return the raw source's fingerprint and the meaning of the labels."""
        meaning = (sorted(self._up), sorted(self._down), self._up_from, self._down_to)
        return f"LabelSource v1 {type(self.raw).__qualname__} {meaning}\n{self.raw.fingerprint(split)}"

    def counts(self, split: Split) -> dict[str, int]:
        """Return the raw source's counts, and the number of rows that were neither up nor down."""
        neither = self._left_out[split]
        return {**self.raw.counts(split), **({left_out("neither up nor down"): neither} if neither else {})}

    def _labeled(self, where: str, row: Mapping[str, Any], split: Split) -> Mapping[str, Any] | None:
        column = Columns.from_mapping(self.columns).label
        if (value := row.get(column)) is None:
            return row  # validation reports the missing label
        label = _spelled(value)
        if label in self._up or label in self._down:
            return {**row, column: label in self._up}
        try:
            number = float(label)
        except ValueError:
            number = float("nan")
        if self._up_from is None or number != number:
            known = sorted(self._up | self._down)
            told = f"write one of {', '.join(map(repr, known))}, or name it" if known else "write a number, or name it"
            raise FeedbackFormatError(
                f"is {str(value)[:40]!r}, which is neither up nor down",
                f"{told} in up or down of LabelSource",
                field="label",
                where=where,
                kind="is neither up nor down",
            )
        if number >= self._up_from:
            return {**row, column: True}
        if self._down_to is None or number <= self._down_to:
            return {**row, column: False}
        self._left_out[split] += 1
        return None


def _spelled(label: object) -> str:
    """Return a label in the form used for comparison: casefolded, numbers in one spelling."""
    text = str(label).strip().casefold()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


Which: TypeAlias = Literal["all", "adjacent"]


class Rated(NamedTuple):
    """A completion, the user's score of it (higher is better), and its location."""

    completion: Text
    score: float
    where: str


class Pair(NamedTuple):
    """Two completions with different scores."""

    chosen: Rated
    rejected: Rated


@dataclass(frozen=True)
class Pairing:
    """Forms pairs from one user's scores of several completions of one prompt.

    Attributes:
        which: `all` pairs of different scores, or only `adjacent` ones: each completion with those of the next lower
            score.
        min_gap: Smallest difference between scores; closer pairs are left out.
        max_pairs: Most pairs per user and prompt, drawn at random, whatever their gap.
        seed: Seed of these draws.
    """

    which: Which = "all"
    min_gap: float = 0.0
    max_pairs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in get_args(Which):
            raise ConfigurationError(f"pairs is {self.which!r}; it must be one of {get_args(Which)}.")
        if not self.min_gap >= 0:
            raise ConfigurationError(f"min_gap is {self.min_gap}; it must be at least 0.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ConfigurationError(f"max_pairs is {self.max_pairs}; it must be at least 1, or null for all pairs.")

    def __call__(self, rated: Sequence[Rated], owner: str, counts: Counter[str]) -> list[Pair]:
        """Return the pairs, in the order of the completions.

        Args:
            rated: One user's scores of completions of one prompt.
            owner: User and prompt; seeds the draw of the pairs that `max_pairs` keeps.
            counts: Counter of pairs that are left out.
        """
        pairs = [pair for pair in self._candidates(rated, counts) if self._differs(pair, counts)]
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            counts[left_out(f"over max_pairs={self.max_pairs} of a user and prompt")] += len(pairs) - self.max_pairs
            draw = sorted(range(len(pairs)), key=lambda i: text_key(f"{self.seed} {owner} {i}"))
            pairs = [pairs[i] for i in sorted(draw[: self.max_pairs])]
        return pairs

    def _candidates(self, rated: Sequence[Rated], counts: Counter[str]) -> Iterator[Pair]:
        levels = sorted({one.score for one in rated}, reverse=True)
        level = {score: number for number, score in enumerate(levels)}
        for first, second in combinations(rated, 2):
            better, worse = (first, second) if first.score > second.score else (second, first)
            distance = level[worse.score] - level[better.score]
            if distance == 0:
                counts[left_out("equal scores")] += 1
            elif self.which == "all" or distance == 1:
                yield Pair(better, worse)

    def _differs(self, pair: Pair, counts: Counter[str]) -> bool:
        if pair.chosen.completion == pair.rejected.completion:
            counts[left_out("one completion with two scores")] += 1
            return False
        if pair.chosen.score - pair.rejected.score < self.min_gap:
            counts[left_out(f"scores closer than min_gap={self.min_gap:g}")] += 1
            return False
        return True


def ranked(completions: Iterable[Text], where: str) -> list[Rated]:
    """Return completions, given best first, with scores one point apart."""
    return [Rated(completion, -float(place), where) for place, completion in enumerate(completions)]
