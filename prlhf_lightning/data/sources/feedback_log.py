"""Feedback that the server has collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

if TYPE_CHECKING:
    from prlhf_lightning.feedback_log import FeedbackLog


class FeedbackLogSource(DataSource):
    """The pairs of a server's feedback log, in the order of receipt. Ties and thumbs are left out.

    Args:
        url: `sqlite:///feedback.db`, `postgresql://user@host/database`, or the path of a SQLite file.
        until: Number of the last row that counts, so that a run can be repeated though the log has grown, and so that
            processes that start together read the same; all that is there at the start if none is given.
    """

    def __init__(self, url: str, until: int | None = None) -> None:
        self._url = url
        self._given_until = until

    def splits(self) -> set[Split]:
        """Return train; the data module holds out a part of it."""
        return {"train"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each pair after its number, such as `sqlite:///feedback.db:17`."""
        empty = True
        for number, record in self._log.pairs(self._until):
            empty = False
            yield f"{self._log.name}:{number}", record
        if empty:
            raise FeedbackFormatError(f"{self._log.name}: has no pairs yet; collect some, or train on other data.")

    def fingerprint(self, split: Split) -> str:
        """Return the log's name and how far it goes; rows are added and removed, never changed."""
        return f"FeedbackLogSource v1 {self._log.name} {self._log.extent(self._until)}"

    @cached_property
    def _until(self) -> int:
        return self._log.extent().last if self._given_until is None else self._given_until

    @cached_property
    def _log(self) -> FeedbackLog:
        try:
            from prlhf_lightning.feedback_log import FeedbackLog  # SQLAlchemy, of the extra `serve`
        except ImportError as error:
            raise ConfigurationError(
                f"FeedbackLogSource needs {error.name}, which is not installed: pip install 'prlhf-lightning[serve]'"
            ) from error
        return FeedbackLog(self._url, create=False)
