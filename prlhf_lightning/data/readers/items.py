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


def without_gaps(value: Any) -> Any:
    """Return a nested value of an Arrow table without the keys that are null in it.

    Arrow gives all objects of a column the same keys, so that a message without tool calls has them as null.
    """
    if isinstance(value, dict):
        return {key: without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [without_gaps(inner) for inner in value] if isinstance(value, list) else value


def refuse_twins(path: Path, columns: list[str]) -> None:
    """Refuse two columns of one name, of which only one could be read. Columns without a name are nobody's."""
    for number, name in enumerate(columns):
        if name and name in columns[:number]:
            raise FeedbackFormatError(
                f"{path}: column {name!r} stands twice (columns {columns.index(name) + 1} and {number + 1}); "
                "rename or remove one of them."
            )
