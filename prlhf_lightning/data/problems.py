"""What is wrong with rows, as data: where, which field, what and how to mend it, grouped by kind with examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from prlhf_lightning.errors import Place, PRLHFError, described

Severity: TypeAlias = Literal["error", "warning"]

_MOST_KINDS = 200  # so that memory is bounded whatever kinds there are
_OTHER = "other"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a row, a file or a user.

    Attributes:
        split: Where it was met.
        file: File, or what else the source names its places by; None for what stands in no one place.
        line: Line (row of a Parquet file), if there is one.
        field: The field that is wrong, if it is one.
        problem: What is wrong.
        fix: What to do about it.
        row_number: Which row of a JSON array it is, counted from 1, for several may stand on one line.
    """

    split: str
    file: str | None
    line: int | None
    field: str | None
    problem: str
    fix: str | None
    row_number: int | None = None

    @classmethod
    def at(cls, split: str, where: str, problem: str, fix: str | None, field: str | None = None) -> Problem:
        """Build a problem of the row at `where`."""
        place = Place.of(where)
        return cls(split, place.file, place.line, field, problem, fix, place.row)

    @classmethod
    def of(cls, split: str, where: str, error: PRLHFError) -> Problem:
        """Return what an error says; it is about the row, or the file, at `where` unless it knows better."""
        return cls.at(split, error.where or where, error.problem, error.fix, error.field)

    @property
    def place(self) -> str:
        """The file, line and number of the row, or what there is of them."""
        return Place(self.file or self.split, self.line, self.row_number)

    def __str__(self) -> str:
        return described(self.place, f"field {self.field!r} " if self.field else "", self.problem, self.fix)


@dataclass
class Group:
    """All problems of one kind.

    Attributes:
        kind: What they have in common.
        severity: Whether training would stop at them.
        count: How many there are.
        examples: The first of them.
    """

    kind: str
    severity: Severity
    count: int = 0
    examples: list[Problem] = field(default_factory=list)


class Problems:
    """Problems as they are found, of which the first few of each kind are kept and the others counted.

    Args:
        examples: How many of each kind are kept.
    """

    def __init__(self, examples: int = 5) -> None:
        self.examples = examples
        self._groups: dict[tuple[Severity, str], Group] = {}

    def __iter__(self) -> Iterator[Group]:
        """Yield errors before warnings, the most frequent first."""
        yield from sorted(self._groups.values(), key=lambda group: (group.severity, -group.count))

    def add(self, severity: Severity, problem: Problem, kind: str) -> None:
        """Count a problem, and keep it if it is one of the first of its kind."""
        group = self._group(severity, kind)
        group.count += 1
        if len(group.examples) < self.examples:
            group.examples.append(problem)

    def add_unseen(self, severity: Severity, kind: str, count: int) -> None:
        """Count problems of which none is to be kept."""
        self._group(severity, kind).count += count

    def _group(self, severity: Severity, kind: str) -> Group:
        if (severity, kind) not in self._groups and len(self._groups) >= _MOST_KINDS:
            kind = _OTHER
        return self._groups.setdefault((severity, kind), Group(kind, severity))

    def count(self, severity: Severity) -> int:
        """Return the number of problems of a severity."""
        return sum(group.count for group in self if group.severity == severity)

    def as_list(self) -> list[dict[str, Any]]:
        """Return the groups as JSON can hold them."""
        return [asdict(group) for group in self]
