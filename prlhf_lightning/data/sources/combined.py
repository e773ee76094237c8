"""Several sources as one: files beside a server's log, or public data beside one's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.schema import Text
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.sources.derived import left_out
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.errors import ConfigurationError


class CombinedSource(DataSource):
    """The rows of several sources, one source after the other.

    Each may name its columns in its own way. A user whom two sources know by the same id is one user. With
    `data.streaming: true` rows come in this order, and are shuffled within blocks only.

    Args:
        sources: The sources, such as a `FileSource` and a `FeedbackLogSource`. Training rows are those of all of them;
            so are the rows of a validation or test split, of the sources that have one.
        weights: How often the training rows of each source are read in an epoch: 2 reads each twice, 0.5 a half of
            them, drawn by `seed`. All once by default. Evaluation reads each row once, and so does `data check`.
        seed: Draws the rows that are read once more or left out.

    Raises:
        ConfigurationError: There are no sources, or weights that do not fit them.
    """

    def __init__(self, sources: Sequence[DataSource], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)
        self.seed = seed
        self._left_out: Counter[Split] = Counter()
        if not self.sources:
            raise ConfigurationError("CombinedSource: sources is an empty list; name one source or more.")
        if len(self.weights) != len(self.sources):
            raise ConfigurationError(
                f"CombinedSource: there are {len(self.weights)} weights for {len(self.sources)} sources; give one each."
            )
        for weight in self.weights:
            if not 0 < weight <= 1000:
                raise ConfigurationError(f"CombinedSource: a weight is {weight}; give a number above 0, up to 1000.")
        # A field whose column is asked for by name must be there, in the rows of each source.
        self.columns = {"system": "system"} if any("system" in source.columns for source in self.sources) else {}

    def splits(self) -> set[Split]:
        """Return the splits that any of the sources has."""
        return set().union(*(source.splits() for source in self.sources))

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the rows of each source that has the split, each after where it stands there."""
        self._left_out[split] = 0
        for source, weight in zip(self.sources, self.weights, strict=True):
            if split in source.splits():
                for number, (where, row) in enumerate(read(source, split)):
                    times = self._times(weight, where, number) if split == "train" else 1
                    self._left_out[split] += not times
                    for _ in range(times):
                        yield where, self._renamed(row, source)

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield each row of each source once, or what stands in its place."""
        for source in self.sources:
            if split in source.splits():
                for where, row in source.scan(split):
                    yield where, row if isinstance(row, Unreadable) else self._renamed(row, source)

    def fingerprint(self, split: Split) -> str:
        """Return those of all sources that have the split, with their columns and weights."""
        parts = [
            f"{type(source).__module__}.{type(source).__qualname__} {sorted(source.columns.items())} {weight} "
            f"{source.fingerprint(split)}"
            for source, weight in zip(self.sources, self.weights, strict=True)
            if split in source.splits()
        ]
        return "\n".join([f"CombinedSource v1 {self.seed}", *parts])

    def counts(self, split: Split) -> dict[str, int]:
        """Return the sums of what the sources counted, and how many rows were left out by a weight below 1."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            if split in source.splits():
                counts.update(source.counts(split))
        if self._left_out[split]:
            counts[left_out("by the weight of their source")] = self._left_out[split]
        return dict(counts)

    def prompts(self) -> Iterator[tuple[str, Text]]:
        """Yield the prompts without judgments of all sources."""
        for source in self.sources:
            yield from source.prompts()

    def _times(self, weight: float, where: str, number: int) -> int:
        """Return how often a training row is read."""
        whole = math.floor(weight)
        return whole + (text_key(f"{self.seed} {number} {where}") < (weight - whole) * 2**64)

    def _renamed(self, row: Mapping[str, Any], source: DataSource) -> Mapping[str, Any]:
        """Return a row with the fields under their own names."""
        renamed = {name: row[name] for name in row if name not in {*source.columns, *source.columns.values()}}
        renamed.update({field: row[column] for field, column in source.columns.items() if column in row})
        if "system" in self.columns and "system" not in source.columns:
            renamed["system"] = None
        return renamed
