"""Data source that combines other sources, such as files and a server's log."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Text
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.sources.derived import left_out
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.errors import ConfigurationError


class CombinedSource(DataSource):
    """Concatenates the rows of several sources.

    Each source may have its own column names. Equal user ids in two sources are the same user. With
    `data.streaming: true` rows come in this order and are shuffled only within blocks.

    Args:
        sources: The sources, such as a `FileSource` and a `FeedbackLogSource`. Each split has the rows of all sources
            with this split.
        weights: How often the training rows of each source are read per epoch: 2 reads each row twice; 0.5 reads a
            random half, drawn by `seed`. By default all are read once. Evaluation and `data check` read each row once.
        seed: Seed of the rows that are repeated or skipped.

    Raises:
        ConfigurationError: There are no sources, or the weights are invalid or not one per source.
    """

    def __init__(self, sources: Sequence[DataSource], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)
        self.seed = seed
        self._left_out: Counter[Split] = Counter()
        if not self.sources:
            raise ConfigurationError("CombinedSource: sources is an empty list; give one source or more.")
        if len(self.weights) != len(self.sources):
            raise ConfigurationError(
                f"CombinedSource: there are {len(self.weights)} weights for {len(self.sources)} sources; give one each."
            )
        for weight in self.weights:
            if not 0 < weight <= 1000:
                raise ConfigurationError(f"CombinedSource: a weight is {weight}; give a number above 0, up to 1000.")
        # A field whose column is named explicitly must exist in the rows of every source.
        self.columns = {"system": "system"} if any("system" in source.columns for source in self.sources) else {}

    def splits(self) -> set[Split]:
        """Return the splits that any of the sources has."""
        return set().union(*(source.splits() for source in self.sources))

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location and row of all sources with the split."""
        self._left_out[split] = 0
        for source, weight in zip(self.sources, self.weights, strict=True):
            if split in source.splits():
                for number, (where, row) in enumerate(read(source, split)):
                    times = self._times(weight, where, number) if split == "train" else 1
                    self._left_out[split] += not times
                    for _ in range(times):
                        yield where, self._renamed(row, source)

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield each row, or `Unreadable`, of each source once."""
        for source in self.sources:
            if split in source.splits():
                for where, row in source.scan(split):
                    yield where, row if isinstance(row, Unreadable) else self._renamed(row, source)

    def fingerprint(self, split: Split) -> str:
        """Return the fingerprints of all sources with the split, with their columns and weights."""
        parts = [
            f"{type(source).__module__}.{type(source).__qualname__} {sorted(source.columns.items())} {weight} "
            f"{source.fingerprint(split)}"
            for source, weight in zip(self.sources, self.weights, strict=True)
            if split in source.splits()
        ]
        return "\n".join([f"CombinedSource v1 {self.seed}", *parts])

    def counts(self, split: Split) -> dict[str, int]:
        """Return the summed counts of the sources, and the number of rows skipped by a weight below 1."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            if split in source.splits():
                counts.update(source.counts(split))
        if self._left_out[split]:
            counts[left_out("by the weight of their source")] = self._left_out[split]
        return dict(counts)

    def prompts(self) -> Iterator[tuple[str, Text]]:
        """Yield the prompts of all sources."""
        for source in self.sources:
            yield from source.prompts()

    def _times(self, weight: float, where: str, number: int) -> int:
        """Return how often a training row is read per epoch."""
        whole = math.floor(weight)
        return whole + (text_key(f"{self.seed} {number} {where}") < (weight - whole) * 2**64)

    def _renamed(self, row: Mapping[str, Any], source: DataSource) -> Mapping[str, Any]:
        """Return a row with its columns renamed to the field names."""
        renamed = {name: row[name] for name in row if name not in {*source.columns, *source.columns.values()}}
        renamed.update({field: row[column] for field, column in source.columns.items() if column in row})
        if "system" in self.columns and "system" not in source.columns:
            renamed["system"] = None
        return renamed
