"""Data source of feedback collected by the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError, Place

if TYPE_CHECKING:
    from prlhf_lightning.data.feedback_log import FeedbackLog


class FeedbackLogSource(DataSource):
    """Pairs or thumbs of a server's feedback log, in the order of receipt, without ties.

    Args:
        url: `sqlite:///feedback.db`, `postgresql://user@host/database`, or the path of a SQLite file.
        until: Number of the last row to read. It makes a run repeatable although the log grows, and processes that
            start together read the same rows. By default all rows present at the start.
        thumbs: Read thumbs instead of pairs, for losses of unpaired feedback.
    """

    def __init__(self, url: str, until: int | None = None, thumbs: bool = False) -> None:
        self._url, self._thumbs = url, thumbs
        self._given_until = until

    def splits(self) -> set[Split]:
        """Return train; the data module holds out validation rows from it."""
        return {"train"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location (such as `sqlite:///feedback.db:17`) and content of each row."""
        empty = True
        read = self._log.thumbs if self._thumbs else self._log.pairs
        for number, record in read(self._until):
            empty = False
            yield Place(self._log.name, number), record
        if empty:
            fix = "collect some, or train on other data"
            raise FeedbackFormatError(f"has no {self._kind} yet", fix, where=self._log.name)

    def fingerprint(self, split: Split) -> str:
        """Return the log's name and extent; rows may be added and removed, but never change."""
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
