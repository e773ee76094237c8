"""Ratings and rankings, in any file or data set, as pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prlhf_lightning.data.missing_columns import all_missing
from prlhf_lightning.data.records import Text, spell_user_id
from prlhf_lightning.data.schema import Schema
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.sources.derived import DerivedSource, Part
from prlhf_lightning.data.sources.pairing import Pair, Pairing, Rated, Which, ranked
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


class _Judged(NamedTuple):
    """Who judged completions of which prompt; `key` tells prompts apart."""

    user_id: str
    key: str
    prompt: Text
    user_text: str | None


class _OfColumns(DerivedSource):
    """Pairs out of rows whose columns can be named by the user."""

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
            raise FeedbackFormatError(all_missing(where, missing, list(row)))
        row = spell_user_id(row, self._names["user_id"])
        user_id = self.schema.get(row, where, self._names["user_id"], kind=str)
        prompt = self._text(row, where, "prompt")
        text: str | None = None
        if self._asks_for_text or row.get("user_text") is not None:
            column = self._names["user_text"]
            text = self.schema.get(row, where, column, kind=str) if row.get(column, "") is not None else None
        return _Judged(user_id, prompt if isinstance(prompt, str) else json.dumps(prompt), prompt, text)

    def _text(self, row: Mapping[str, Any], where: str, field: str) -> Text:
        """Return a string, or a conversation, whose messages are checked with the pair."""
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
    places = list(dict.fromkeys((pair.chosen.where, pair.rejected.where)))
    return " and ".join(places)


class RatingSource(_OfColumns):
    """Ratings by users of completions, as pairs of completions that one user rated differently.

    A row is one rating: `user_id`, `prompt`, `completion`, `rating` (a number), and `user_text` if there is one. Rows
    may stand in any order, so all are held in memory. Pairs are made for each user and prompt in the order in which
    these first appear. Equal ratings make no pair and are counted.

    Args:
        raw: Where the rows are, such as a `FileSource` or a `HubSource`.
        columns: Names of columns that differ from the fields', such as `{completion: joke, rating: stars}`.
        min_gap: Least difference of the two ratings of a pair.
        max_pairs: Most pairs of one user and prompt, drawn at random; all by default.
        pairs: `all` pairs, or those of `adjacent` ratings alone.
        higher_is_better: Whether a higher rating is the better one; false for ranks, of which 1 is the best.
        seed: Draws the pairs that `max_pairs` keeps.

    Raises:
        FeedbackFormatError: A field is missing, or a rating is no finite number.
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
    """Rankings by users of several completions, as pairs.

    A row is one ranking: `user_id`, `prompt`, `completions` (a list, the best first), and `user_text` if there is one.
    Where completions may share a place, `ranks` holds the place of each, in the same order, of which the lowest is the
    best; the completions then need not be sorted. Where each place is a row of its own, use `RatingSource` with
    `higher_is_better: false`.

    Args:
        raw: Where the rows are, such as a `FileSource` or a `HubSource`.
        columns: Names of columns that differ from the fields', such as `{completions: answers}`.
        pairs: `adjacent` places alone, or `all` pairs, of which a ranking of n completions has n(n-1)/2.
        max_pairs: Most pairs of one ranking, drawn at random; all by default.
        seed: Draws the pairs that `max_pairs` keeps.

    Raises:
        FeedbackFormatError: A field is missing, or there are not as many ranks as completions.
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
            schema.fail(where, (ranks,), f"must hold one place for each of the {len(completions)} completions")
        places = [schema.number(row, where, ranks, i) for i in range(len(completions))]
        return [Rated(text, -place, where) for text, place in zip(completions, places, strict=True)]
