"""Errors that a person can act on: each names the place, the problem and the fix, as text and as fields."""

from __future__ import annotations

from typing import Self


class Place(str):
    """The place of a row, as text with its parts: `votes.jsonl`, `votes.jsonl:17` or `votes.json:1, row 17`.

    It is a string, so that a `DataSource` of your own may also yield plain strings.

    Args:
        file: The file, or what else a source names its rows by, such as `organization/name[train]`.
        line: The line (row of a Parquet file or of a data set), counted from 1.
        row: The row of a JSON array, counted from 1, as one line may hold several.
    """

    __slots__ = ("file", "line", "row")

    file: str
    line: int | None
    row: int | None

    def __new__(cls, file: str, line: int | None = None, row: int | None = None) -> Self:
        """Join the parts."""
        text = file if line is None else f"{file}:{line}" if row is None else f"{file}:{line}, row {row}"
        place = str.__new__(cls, text)
        place.file, place.line, place.row = file, line, row
        return place

    @classmethod
    def of(cls, where: str) -> Place:
        """Return a `Place` unchanged, and any other text as the name of a file."""
        return where if isinstance(where, Place) else cls(where)


class PRLHFError(Exception):
    """Base of every error that this package raises on purpose.

    Its text is `where: field: problem; fix.`, of which all but the problem may be missing.

    Args:
        problem: What is wrong; a whole sentence where nothing else is given.
        fix: What to do about it, without a full stop.
        field: The field or the setting that is wrong.
        where: Where it is wrong.
        kind: What errors of one sort have in common: the problem without values, names and numbers. The problem itself
            if none is given.

    Attributes:
        problem: As above.
        fix: As above, or None.
        field: As above, or None.
        where: The place, or None.
        kind: Groups errors: the field, if there is one, and the kind as above.
    """

    def __init__(
        self,
        problem: str = "",
        fix: str | None = None,
        *,
        field: str | None = None,
        where: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.fix, self.field = problem, fix, field
        self.where = Place.of(where) if where else None
        self.kind = f"{field}: {kind or problem}" if field else kind or problem

    def __str__(self) -> str:
        return described(self.where, f"{self.field}: " if self.field else "", self.problem, self.fix)


class FeedbackFormatError(PRLHFError, ValueError):
    """A feedback file or row is not what it should be: `path:line: field 'name' problem; fix.` in words."""

    def __str__(self) -> str:
        return described(self.where, f"field {self.field!r} " if self.field else "", self.problem, self.fix)


def described(where: str | None, name: str, problem: str, fix: str | None) -> str:
    """Return what is wrong as one sentence."""
    return (f"{where}: " if where else "") + name + problem + (f"; {fix}." if fix else "")


class ConfigurationError(PRLHFError, ValueError):
    """Settings that contradict one another or the model in use."""


class PromptTooLongError(ConfigurationError):
    """A prompt that leaves no position of the model for an answer."""


class NonFiniteError(PRLHFError, ArithmeticError):
    """A loss, a gradient or weights are infinite or NaN: in training, or in what a checkpoint or an export holds.

    In training all processes raise it in the same step.
    """


class DamagedCheckpointError(ConfigurationError):
    """A checkpoint file that is not, byte for byte, what was written, or that never was a checkpoint."""


class CheckpointWriteError(PRLHFError, OSError):
    """A file that could not be written, as on a full disk; what was there before it is untouched."""


class JudgeError(PRLHFError):
    """A judge that gave no verdict on a question; the message says why, and nothing of what was asked."""
