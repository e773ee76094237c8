"""Stars, scores or words of any sort as thumbs up and down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Columns
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.data.sources.derived import left_out
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

Label: TypeAlias = str | bool | int | float


class LabelSource(DataSource):
    """Thumbs out of labels of any sort, for losses that take thumbs.

    Name the labels, as in `up: [great, good], down: [bad]`, or thresholds, as in `up_from: 4, down_to: 2` for stars
    from 1 to 5. What is neither by the thresholds is left out and counted. (Words such as good and bad, up and down,
    like and dislike, and 1 and 0 or 1 and -1 need no `LabelSource`.)

    Args:
        raw: Where the rows are, such as a `FileSource` or a `HubSource`; its `columns` name the column of the label.
        up: Labels that are a thumbs-up.
        down: Labels that are a thumbs-down.
        up_from: The least number that is a thumbs-up.
        down_to: The greatest number that is a thumbs-down; if none is given, all numbers below `up_from` are.

    Raises:
        ConfigurationError: Neither labels nor thresholds are named, or they contradict one another.
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
                "LabelSource: name labels, as in up: [great, good], down: [bad], or a threshold, as in up_from: 4."
            )
        if up_from is not None and down_to is not None and down_to >= up_from:
            raise ConfigurationError(f"LabelSource: down_to is {down_to} and up_from {up_from}; it must be below that.")

    def splits(self) -> set[Split]:
        """Return those of the raw source."""
        return self.raw.splits()

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the raw rows with true or false for a label, but for those that are neither."""
        self._left_out[split] = 0
        for where, row in read(self.raw, split):
            if (labeled := self._labeled(where, row, split)) is not None:
                yield where, labeled

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield what `rows` does, but go on after what is wrong."""
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
        """Return the raw source's, and what the labels mean."""
        meaning = (sorted(self._up), sorted(self._down), self._up_from, self._down_to)
        return f"LabelSource v1 {type(self.raw).__qualname__} {meaning}\n{self.raw.fingerprint(split)}"

    def counts(self, split: Split) -> dict[str, int]:
        """Return the raw source's, and how many rows were neither up nor down."""
        neither = self._left_out[split]
        return {**self.raw.counts(split), **({left_out("neither up nor down"): neither} if neither else {})}

    def _labeled(self, where: str, row: Mapping[str, Any], split: Split) -> Mapping[str, Any] | None:
        column = Columns.from_mapping(self.columns).label
        if (value := row.get(column)) is None:
            return row  # which is refused for it
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
                f"{where}: field 'label' is {str(value)[:40]!r}, which is neither up nor down; {told} in up or down of "
                "LabelSource."
            )
        if number >= self._up_from:
            return {**row, column: True}
        if self._down_to is None or number <= self._down_to:
            return {**row, column: False}
        self._left_out[split] += 1
        return None


def _spelled(label: object) -> str:
    """Return a label as it is compared: without regard to case, and numbers in one spelling."""
    text = str(label).strip().casefold()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
