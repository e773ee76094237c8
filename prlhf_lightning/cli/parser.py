"""The command line's parser: short error messages with suggestions, without a hundred lines of usage."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import isabstract, signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, auto_cli
from jsonargparse._formatters import DefaultHelpFormatter  # it is in no public place

from prlhf_lightning.cli import literals
from prlhf_lightning.cli.class_arguments import begin_other_classes_anew
from prlhf_lightning.cli.commands import PROGRAM
from prlhf_lightning.utils.terminal import LAYOUT, printable, shortened
from prlhf_lightning.utils.trust import current_folder, raise_refusal, words_of_user

#: Settings with a class as value, by the end of their names.
_COMPONENTS = {
    "user_model": ("prlhf_lightning.user_models", "UserModel"),
    "policy": ("prlhf_lightning.policies", "Policy"),
    "loss": ("prlhf_lightning.losses", "PreferenceLoss"),
    "source": ("prlhf_lightning.data", "DataSource"),
    "judge": ("prlhf_lightning.analysis.judges", "Judge"),
}
#: The intended setting if a file or a model's name is given in place of a class.
_PATHS = {"data.source": "train", "model.policy": "model"}
_WORD = r"(?:string: |[oO]ption '|attribute '|choice: '|arguments: --)([\w.]+)"


begin_other_classes_anew()


class _Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of a text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Explaining(ArgumentParser):
    """Explains errors in a few lines.

    Attributes:
        called: Name of the parsed command.
    """

    called = PROGRAM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"prog": PROGRAM, "formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(*args, **{**defaults, **{key: value for key, value in kwargs.items() if value is not None}})

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check a configuration; an error names the parser that refused it, which may be that of a component."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            if not hasattr(error, "refused_by"):  # by a parser within this one
                error.refused_by = self  # type: ignore[attr-defined]
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and suggestions, and exit."""
        raise_refusal()
        asked = getattr(ex, "subcommand_parser", None) or self
        options = {str(action.dest) for action in asked._actions}
        hints = list(_hints(message, options))
        refused_by = getattr(ex, "refused_by", None)
        if refused_by is not None and not refused_by._subcommands_action:
            known = sorted(action.dest for action in refused_by._actions if action.dest != "help")
            hints.append(f"Here there are: {', '.join(known)}")
        hints.append(f"All options: {self.called} --help")
        sys.stderr.write("error: " + printable("\n".join([shortened(message), *hints]), LAYOUT) + "\n")
        self.exit(2)


class TaskParser(Explaining):
    """Parser of one task: text arguments of the function's signature are plain text; see `literals`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "parser_mode": literals.MODE})
        # For a component's own parser and its argument groups, jsonargparse creates the values itself.
        self._kinds: dict[str, literals.Kind] | None = {} if "prog" in kwargs else None

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; `literals` parses text."""
        annotation = kwargs.get("type", getattr(kwargs.get("action"), "_typehint", None))
        kinds, kind = getattr(self, "_kinds", None), literals.kind_of(annotation)
        if kind is not None and kinds is not None:
            kwargs = {key: value for key, value in kwargs.items() if key != "action"} | {"type": kind}
            args = args[:1]  # without jsonargparse's name for appending to a list
            kinds[args[0]] = kind
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse words; text is kept unchanged."""
        words = sys.argv[1:] if args is None else args
        if twice := literals.given_twice(words, self._kinds or {}):
            self.error(twice)
        return super().parse_args(literals.joined(words, self._kinds or {}), *others, **kwargs)


def run_task(function: Callable[..., Any], path: Sequence[str], words: list[str]) -> None:
    """Call a function with the arguments that the command line gives as options.

    Args:
        function: The function.
        path: The words of the command.
        words: Its options.
    """
    Explaining.called = " ".join([PROGRAM, *path])
    with words_of_user():
        auto_cli(function, args=words, as_positional=False, parser_class=TaskParser, prog=Explaining.called)


def _components() -> dict[str, type]:
    """Return the loaded kinds of components: the current command uses no others."""
    loaded = {setting: (sys.modules.get(module), name) for setting, (module, name) in _COMPONENTS.items()}
    return {setting: getattr(module, name) for setting, (module, name) in loaded.items() if module is not None}


def _hints(message: str, options: set[str]) -> Iterator[str]:
    components = _components()
    known = {name for component in components.values() for name in _names(component)} | options
    known |= {name.rpartition(".")[2] for name in known}
    for word in re.findall(_WORD, message):
        if full := _in_full(word, options):
            yield f"{word!r}: did you mean {' or '.join(map(repr, full))}?"
        elif close := difflib.get_close_matches(word, known - {word}, n=2, cutoff=0.75):
            yield f"{word!r}: did you mean {' or '.join(map(repr, close))}?"
    for key, value in re.findall(r'Parser key "([\w.]+)":\s+- Expected a path but (\S+)', message):
        component = components.get(key.rpartition(".")[2])
        if re.search(r"/|\.(?:jsonl?|csv|tsv|parquet|gz)$", value) and key in _PATHS:
            yield f"To give {value}: --{key}.{_PATHS[key]} {value}"
        elif component and not re.search(r"[/.]", value):
            yield f"There are: {', '.join(_usable(component))}; one of your own is named as my_file.MyClass"
    for module in re.findall(r"No module named '([\w.]+)'", message):
        yield f"{module.replace('.', '/')}.py is looked for in {current_folder()}, and in what is installed"


def _in_full(word: str, options: set[str]) -> list[str]:
    """Return the options with the same last name as an unknown one, such as `data.source.train` for `data.train`."""
    name = word.rpartition(".")[2]
    found = [option for option in options if option.rpartition(".")[2] == name and option != word]
    components = _components()
    for option in options:
        component = components.get(option.rpartition(".")[2])
        if component and any(name in signature(subclass).parameters for subclass in _subclasses(component)):
            found.append(f"{option}.{name}")
    return sorted(found)[:3]


def _subclasses(component: type) -> Iterator[type]:
    direct: list[type] = component.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


def _usable(component: type) -> list[str]:
    """Return the names of the classes of a kind that a configuration can use without a path."""
    found = {subclass.__name__ for subclass in _subclasses(component) if not isabstract(subclass)}
    return sorted(name for name in found if not name.startswith("_"))


def _names(component: type) -> Iterator[str]:
    for subclass in _subclasses(component):
        yield subclass.__name__
        yield from signature(subclass).parameters
