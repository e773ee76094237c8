"""What every reader yields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prlhf_lightning.errors import FeedbackFormatError

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that cannot be read.

    Attributes:
        error: What is wrong with it.
        raw: What stands there, as far as it could be told, for whoever wants to mend it.
        rest: Whether all that follows in the file cannot be read either. It is then not known how many rows that is.
    """

    error: FeedbackFormatError
    raw: Any = None
    rest: bool = False


Items: TypeAlias = Iterator[tuple[str, Row | Unreadable]]
"""Where a row stands, such as `votes.jsonl:17`, and the row."""


def refuse_twins(path: Path, columns: list[str]) -> None:
    """Refuse two columns of one name, of which only one could be read. Columns without a name are nobody's."""
    for number, name in enumerate(columns):
        if name and name in columns[:number]:
            raise FeedbackFormatError(
                f"{path}: column {name!r} stands twice (columns {columns.index(name) + 1} and {number + 1}); "
                "rename or remove one of them."
            )
