"""Fields of rows that have another shape than ours, each checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from prlhf_lightning.data.conversations import check_characters
from prlhf_lightning.errors import FeedbackFormatError

_T = TypeVar("_T")
_KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Schema:
    """Reads fields by their path, and says what is wrong where they are not as expected.

    Messages name place and field, and never quote a value: it may be about a person.

    Attributes:
        name: What the rows are, as in "a row of the original comparisons".
        fix: What to do where one is not.
    """

    name: str
    fix: str = "read the original file, or data of your own with FileSource"

    def get(self, row: Any, where: str, *path: str | int, kind: type[_T]) -> _T:
        """Return the value at a path such as `("summaries", 0, "text")`.

        Args:
            row: The row, or a part of it.
            where: Where it stands; every message starts with it.
            path: Keys of objects and places in lists, from the row down.
            kind: `str`, `int`, `bool`, `list` or `dict`.

        Raises:
            FeedbackFormatError: It is missing or of another kind.
        """
        value = self._follow(row, where, path)
        right = isinstance(value, Mapping if kind is dict else kind) and not (kind is int and isinstance(value, bool))
        if not right:
            self.fail(where, path, f"is {_found(value)} where {self.name} has {_KINDS[kind]}")
        if isinstance(value, str):
            check_characters(value, where, _shown(path))
        return value  # type: ignore[no-any-return]

    def number(self, row: Any, where: str, *path: str | int) -> float:
        """Return the finite number at a path; CSV files hold numbers as strings."""
        value = self._follow(row, where, path)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.fail(where, path, f"is a string that is no number where {self.name} has a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(where, path, f"is {_found(value)} where {self.name} has a number")
        if not math.isfinite(value):
            self.fail(where, path, f"is {value}, which is no judgement")
        return float(value)

    def fail(self, where: str, path: tuple[str | int, ...], problem: str) -> NoReturn:
        """Raise the error that says what is wrong with a field."""
        raise FeedbackFormatError(f"{where}: field {_shown(path)!r} {problem}; {self.fix}.")

    def _follow(self, row: Any, where: str, path: tuple[str | int, ...]) -> Any:
        value = row
        for depth, key in enumerate(path, start=1):
            here = isinstance(value, list) if isinstance(key, int) else isinstance(value, Mapping)
            if not here:
                kind = _KINDS[list if isinstance(key, int) else dict]
                self.fail(where, path[: depth - 1] or path, f"is {_found(value)} where {self.name} has {kind}")
            if (key >= len(value)) if isinstance(key, int) else (key not in value):
                self.fail(where, path[:depth], f"is missing from {self.name}")
            value = value[key]
        return value


def _shown(path: tuple[str | int, ...]) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return "".join(parts).removeprefix(".")


def _found(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")
