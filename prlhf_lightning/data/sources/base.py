"""SUBCLASS HERE: a place that raw feedback rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.schema import Text
from prlhf_lightning.errors import FeedbackFormatError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DataSource(ABC):
    """Raw feedback rows, split by split.

    A source only finds and reads rows: validating, tokenizing, caching, splitting and grouping by user are done by
    `PreferenceDataModule`, the same for every source. Rows are mappings with the fields `user_id`, `prompt`, `chosen`,
    `rejected` (thumbs: `completion` and `label`) and, optionally, `user_text`, or other names that `columns` maps to
    these.

    Attributes:
        columns: Field name to the column that holds it, for the fields whose column is named otherwise, such as
            `{"user_id": "worker"}`.
    """

    columns: Mapping[str, str] = {}

    @abstractmethod
    def splits(self) -> set[Split]:
        """Return the splits that this source has; `train` is one of them unless it serves evaluation only."""

    @abstractmethod
    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each row of a split after where it stands (such as `votes.jsonl:17`), always in the same order.

        Large sources stream: memory does not grow with the number of rows.
        """

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield what `rows` does, but an `Unreadable` in the place of each error; override it to go on after one."""
        try:
            yield from read(self, split)
        except FeedbackFormatError as error:
            yield str(error).partition(": ")[0], Unreadable(error, rest=True)

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Return a string that changes whenever the rows of a split may have changed.

        It is the key of the tokenized cache, so it is cheap to compute (path, size and modification time of files, or
        the settings of a generator) and names everything that the rows depend on.
        """

    def counts(self, split: Split) -> dict[str, int]:
        """Return how much of a split met with what on the way, as of the last full pass of `rows`.

        A source that leaves rows out by a protocol says so here, as in `{"left out (equal summaries)": 12}`, and the
        data module's description repeats it: "train: 12 left out (equal summaries)".
        """
        return {}

    def prompts(self) -> Iterator[tuple[str, Text]]:
        """Yield prompts without judgments, each after where it stands, for `predict` to answer for every seen user.

        Without any, which is the default, the prompts of the test or the validation split are answered.
        """
        yield from ()


def read(source: DataSource, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a source's rows; what goes wrong in reading them is told apart from what does in writing a cache.

    Raises:
        FeedbackFormatError: The rows cannot be reached.
    """
    try:
        yield from source.rows(split)
    except OSError as error:
        raise FeedbackFormatError(
            f"The {split} split of {type(source).__name__} cannot be read ({error}); check that it can be reached."
        ) from error
