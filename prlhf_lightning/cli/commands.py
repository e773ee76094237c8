"""The table of commands. Commands are referenced by name, since importing them may take seconds."""

from __future__ import annotations

import ast
import difflib
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import SourceLoader
from importlib.util import find_spec
from typing import Any, TypeAlias

PROGRAM = "prlhf-lightning"


@dataclass(frozen=True)
class Task:
    """A function of a module of `cli`; its arguments are the options.

    Attributes:
        place: Module and function.
    """

    place: str

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        function: Callable[..., Any] = getattr(import_module(self._module), self._function)
        return function

    @property
    def summary(self) -> str:
        """The first line of its docstring, which is parsed, not imported."""
        spec = find_spec(self._module)
        source = spec.loader.get_source(self._module) if spec and isinstance(spec.loader, SourceLoader) else None
        for node in ast.parse(source or "").body:
            if isinstance(node, ast.FunctionDef) and node.name == self._function:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        return ""

    @property
    def _module(self) -> str:
        return f"prlhf_lightning.cli.{self.place.partition('.')[0]}"

    @property
    def _function(self) -> str:
        return self.place.partition(".")[2]


@dataclass(frozen=True)
class Training:
    """A command of Lightning's, which configures a whole run."""

    summary: str


@dataclass(frozen=True)
class Group:
    """Commands under one name."""

    summary: str
    members: Mapping[str, Command]


Command: TypeAlias = Task | Training | Group

COMMANDS = Group(
    "Train and use language models that write differently for each user.",
    {
        "fit": Training("Train a model, or resume a run."),
        "validate": Training("Evaluate a checkpoint on the validation data."),
        "test": Training("Evaluate a checkpoint on the test data."),
        "predict": Training("Generate an answer to each held-out prompt."),
        "adapt": Task("adapt.adapt"),
        "export": Task("export.export"),
        "generate": Task("generate.generate"),
        "make-pairs": Task("make_pairs.make_pairs"),
        "score": Task("score.score"),
        "report": Task("report.report"),
        "serve": Task("serve.serve"),
        "shrink": Task("shrink.shrink"),
        "relocate": Task("relocate.relocate"),
        "api-key": Task("api_key.api_key"),
        "users": Group(
            "List, show, add, remove or export the users of a checkpoint.",
            {
                "list": Task("users.list_users"),
                "show": Task("users.show"),
                "add": Task("users.add"),
                "remove": Task("users.remove"),
                "export": Task("users.export"),
            },
        ),
        "data": Group(
            "Check or describe feedback, or convert it to Parquet.",
            {
                "check": Task("data_check.check"),
                "convert": Task("data_convert.convert"),
                "describe": Task("data_describe.describe"),
            },
        ),
    },
)


def find(words: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """Return the command of the first words, and these words; a group if no member is named."""
    here: Command = COMMANDS
    for depth, word in enumerate(words):
        if not isinstance(here, Group) or word not in here.members:
            return here, words[:depth]
        here = here.members[word]
    return here, words


def described(group: Group, path: Sequence[str]) -> str:
    """Return the help text of a group of commands."""
    width = max(map(len, group.members)) + 4
    lines = [f"usage: {' '.join([PROGRAM, *path])} COMMAND [OPTIONS]", "", group.summary, "", "commands:"]
    for name, command in group.members.items():
        lines += textwrap.wrap(
            f"  {name:{width - 2}}{command.summary}",
            max(shutil.get_terminal_size().columns - 2, width + 20),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", f"Each explains itself: {' '.join([PROGRAM, *path])} COMMAND --help"])


def refusal(group: Group, path: Sequence[str], word: str | None) -> str:
    """Return the error message for a missing or unknown command."""
    what = f"There is no command {word!r} here." if word else "Which command?"
    lines = [f"error: {what}", f"There are: {', '.join(group.members)}"]
    if word and (meant := _meant(word)):
        lines.insert(1, f"{word!r}: did you mean {' or '.join(map(repr, meant))}?")
    return "\n".join([*lines, f"What each does: {' '.join([PROGRAM, *path])} --help"])


def _meant(word: str) -> list[str]:
    full = list(_names(COMMANDS))
    by_last: dict[str, list[str]] = {}
    for name in full:
        by_last.setdefault(name.rpartition(" ")[2], []).append(name)
    return [name for last in difflib.get_close_matches(word, by_last, n=2, cutoff=0.75) for name in by_last[last]]


def _names(group: Group) -> Iterator[str]:
    for name, command in group.members.items():
        yield name
        if isinstance(command, Group):
            yield from (f"{name} {member}" for member in _names(command))
