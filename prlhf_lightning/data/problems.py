"""Errors about rows as data: where, which field, what and how to mend it, grouped by kind with examples of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning"]

_MOST_KINDS = 200  # so that memory is bounded whatever messages there are
_OTHER = "other"
# Values and names that a message quotes, as `repr` writes them, or cut short with dots.
_QUOTED = re.compile(r"(?<!\w)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|['\"][^;]*?\.\.\.)", re.DOTALL)
_NUMBER = re.compile(r"U\+[0-9A-F]+|(?<![\w-])-?\d[\w.+-]*")
_PLACE = r":([0-9]{1,18})(?:, row ([0-9]{1,18}))?"
_FIELD = re.compile(r"field '(?P<field>[^']*)':? (?P<problem>.*)", re.DOTALL)


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
    def at(cls, split: str, where: str, problem: str, fix: str, field: str | None = None) -> Problem:
        """Build a problem of the row at `where`."""
        file, line, row_number = _parts(where)
        return cls(split, file, line, field, problem, fix, row_number)

    @classmethod
    def of(cls, split: str, where: str, error: Exception) -> Problem:
        """Take apart an error about the row, or the file, at `where`, as in `where: field 'name' problem; fix`."""
        text = str(error)
        if text.startswith(where):  # an error about a file may go on with the line
            rest = re.match(rf"(?:{_PLACE})?", text[len(where) :])[0]  # type: ignore[index]
            where, text = where + rest, text[len(where + rest) :].removeprefix(":").removeprefix(" ")
        named = _FIELD.match(text)
        text = named["problem"] if named else text
        end = _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), text).find("; ")
        problem, fix = (text, None) if end < 0 else (text[:end], text[end + 2 :])
        file, line, row_number = _parts(where)
        return cls(split, file, line, named["field"] if named else None, problem, fix, row_number)

    @property
    def kind(self) -> str:
        """What problems of one sort have in common: the field and the problem without values, names and numbers."""
        text = _QUOTED.sub("'…'", self.problem).partition(": ")[0]
        text = _NUMBER.sub("N", re.sub(r"\s*\(.*\)?", "", text, flags=re.DOTALL)).strip(" .")
        return f"{self.field}: {text}" if self.field else text

    @property
    def place(self) -> str:
        """The file, line and number of the row, or what there is of them."""
        row = f", row {self.row_number}" if self.row_number is not None else ""
        return (self.file or self.split) + (f":{self.line}{row}" if self.line is not None else "")

    def __str__(self) -> str:
        named = f" field {self.field!r}" if self.field else ""
        return f"{self.place}:{named} {self.problem}" + (f"; {self.fix}" if self.fix else "")


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

    def add(self, severity: Severity, problem: Problem, kind: str | None = None) -> None:
        """Count a problem, and keep it if it is one of the first of its kind."""
        group = self._group(severity, problem.kind if kind is None else kind)
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


def _parts(where: str) -> tuple[str, int | None, int | None]:
    """Return the file, line and number of the row of a place, or the place where it has no such parts."""
    parts = re.fullmatch(rf"(.+){_PLACE}", where, re.DOTALL)
    return (parts[1], int(parts[2]), int(parts[3]) if parts[3] else None) if parts else (where, None, None)
