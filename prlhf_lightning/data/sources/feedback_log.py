"""Feedback that the server has collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

if TYPE_CHECKING:
    from prlhf_lightning.data.feedback_log import FeedbackLog


class FeedbackLogSource(DataSource):
    """The pairs of a server's feedback log, or its thumbs, in the order of receipt. Ties are left out.

    Args:
        url: `sqlite:///feedback.db`, `postgresql://user@host/database`, or the path of a SQLite file.
        until: Number of the last row that counts, so that a run can be repeated though the log has grown, and so that
            processes that start together read the same; all that is there at the start if none is given.
        thumbs: Read the thumbs, for losses that take them, and not the pairs.
    """

    def __init__(self, url: str, until: int | None = None, thumbs: bool = False) -> None:
        self._url, self._thumbs = url, thumbs
        self._given_until = until

    def splits(self) -> set[Split]:
        """Return train; the data module holds out a part of it."""
        return {"train"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each row after its number, such as `sqlite:///feedback.db:17`."""
        empty = True
        read = self._log.thumbs if self._thumbs else self._log.pairs
        for number, record in read(self._until):
            empty = False
            yield f"{self._log.name}:{number}", record
        if empty:
            raise FeedbackFormatError(
                f"{self._log.name}: has no {self._kind} yet; collect some, or train on other data."
            )

    def fingerprint(self, split: Split) -> str:
        """Return the log's name and how far it goes; rows are added and removed, never changed."""
        return f"FeedbackLogSource v1 {self._kind} {self._log.name} {self._log.extent(self._until)}"

    @property
    def _kind(self) -> str:
        return "thumbs" if self._thumbs else "pairs"

    @cached_property
    def _until(self) -> int:
        return self._log.extent().last if self._given_until is None else self._given_until

    @cached_property
    def _log(self) -> FeedbackLog:
        try:
            from prlhf_lightning.data.feedback_log import FeedbackLog  # SQLAlchemy, of the extra `serve`
        except ImportError as error:
            raise ConfigurationError(
                f"FeedbackLogSource needs {error.name}, which is not installed: pip install 'prlhf-lightning[serve]'"
            ) from error
        return FeedbackLog(self._url, create=False)
