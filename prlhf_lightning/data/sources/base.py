"""Base class of data sources; subclass it to read feedback rows from anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Text
from prlhf_lightning.errors import FeedbackFormatError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DataSource(ABC):
    """Base class: raw feedback rows by split.

    A source only finds and reads rows. `PreferenceDataModule` validates, tokenizes, caches, splits and groups the rows
    of every source in the same way. A row is a mapping with the fields `user_id`, `prompt`, `chosen`, `rejected`
    (thumbs: `completion` and `label`) and, optionally, `user_text`; `columns` maps other column names to these.

    Attributes:
        columns: Column name of each field whose column has another name, such as `{"user_id": "worker"}`.
    """

    columns: Mapping[str, str] = {}

    @abstractmethod
    def splits(self) -> set[Split]:
        """Return the splits of this source; with `train`, unless it is for evaluation only."""

    @abstractmethod
    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location (such as `votes.jsonl:17`) and the row of each row of a split, always in the same order.

        Use a `Place`, so that error reports know the file and the line; other text counts as the name of a file.
        Large sources should stream rows: memory must not grow with their number.
        """

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield the same as `rows`, with an `Unreadable` instead of an error; override it to continue after errors."""
        try:
            yield from read(self, split)
        except FeedbackFormatError as error:
            yield error.where or split, Unreadable(error, rest=True)

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Return a string that changes whenever the rows of a split may have changed.

        It is the key of the cache of tokenized rows. So it must be cheap (path, size and modification time of files, or
        the settings of a generator) and include everything that the rows depend on.
        """

    def counts(self, split: Split) -> dict[str, int]:
        """Return counts of dropped or changed rows of a split, from the last full pass of `rows`.

        For example, `{"left out (equal summaries)": 12}`; the data module's summary then says "train: 12 left out
        (equal summaries)".
        """
        return {}

    def prompts(self) -> Iterator[tuple[str, Text]]:
        """Yield the location and text of prompts without judgments; `predict` answers them for every seen user.

        By default there are none, and `predict` answers the prompts of the test or validation split.
        """
        yield from ()


def read(source: DataSource, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a source's rows; turn system errors in reading into `FeedbackFormatError`.

    Callers can thus tell them from system errors in writing a cache.

    Raises:
        FeedbackFormatError: The rows cannot be reached.
    """
    try:
        yield from source.rows(split)
    except OSError as error:
        raise FeedbackFormatError(
            f"The {split} split of {type(source).__name__} cannot be read ({error})",
            "check that it can be reached",
            kind="cannot be read",
        ) from error
