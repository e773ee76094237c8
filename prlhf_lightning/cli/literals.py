"""Text arguments of the command line: ids, prompts, names and paths are plain text, never YAML."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]  # it has no stubs
from jsonargparse import set_dumper, set_loader

#: The parser mode in which scalars of a configuration file are plain text.
MODE = "literal"
# Prefix of a list from the command line: NUL can occur neither in a process argument nor in YAML.
_MARK = "\0"
_OPTION = re.compile(r"--[A-Za-z][\w.-]*\+?(=.*)?|--", re.DOTALL)


@dataclass(frozen=True)
class Kind:
    """Parser of a text argument.

    Attributes:
        name: Its name in the help.
        read: Returns the value of an input from the command line, a configuration file or Python.
    """

    name: str
    read: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        """Return the parsed value; a parsed value is returned unchanged."""
        return self.read(value)

    def __repr__(self) -> str:
        return self.name


class _GivenTwice(yaml.constructor.ConstructorError):  # type: ignore[misc]
    """A mapping has a key twice."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads every plain scalar except `null` as a string: 007, 1e3, yes and 2024-01-01 stay text."""

    yaml_implicit_resolvers = {"n": [("tag:yaml.org,2002:null", re.compile("null$"))]}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; a repeated key is refused, since YAML would drop its first value."""
        seen = set()
        for key_node, _ in node.value:
            key = _spelled(self.construct_object(key_node, deep=True))
            if isinstance(key, str) and key in seen:
                raise _GivenTwice(None, None, f"{key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load(text: str) -> Any:
    """Return the content of YAML: strings, lists, mappings, and None for `null`."""
    return yaml.load(text, Loader=_Loader)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes paths as text."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def dump(data: Any) -> str:
    """Return YAML that `load` reads back."""
    return str(yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, dump)


class NotText(ArgumentTypeError, ValueError):
    """The value of a text argument is not text; the message names the problem."""


def _text(value: Any) -> str:
    """Return a text unchanged."""
    if not isinstance(value, str):
        raise NotText(f"this is a {type(value).__name__}, and must be one text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotText(f"{value!r} is not valid UTF-8") from error
    return value


def _path(value: Any) -> Path:
    """Return a path; an empty one is refused, since it would be the current folder."""
    if isinstance(value, Path):
        return value
    text = _text(value)
    if not text.strip() or "\0" in text:
        raise NotText(f"{text!r} is not a path; give a file or folder, or leave the option out")
    return Path(text)


def _texts(value: Any) -> list[str]:
    """Return a list of unchanged texts from the command line, a configuration file, or Python."""
    if isinstance(value, str):
        value = json.loads(value[len(_MARK) :]) if value.startswith(_MARK) else [value]
    if not isinstance(value, list):
        raise NotText(f"this is a {type(value).__name__}, and must be one text or a list of texts")
    return [_text(_spelled(one)) for one in value]


def _shares(value: Any) -> dict[str, float]:
    """Return a mapping of texts to numbers, such as `{ann: 0.5, 007: 0.5}`."""
    try:
        return {key: float(number) for key, number in _mapping(value).items()}
    except NotText:
        raise
    except (TypeError, ValueError) as error:
        raise NotText(f"{value!r} must give each name a number, as in {{ann: 0.5, bob: 0.5}}") from error


def _names(value: Any) -> dict[str, str]:
    """Return a mapping of texts to texts, such as `{user_id: worker}`."""
    return {key: _text(_spelled(one)) for key, one in _mapping(value).items()}


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = load(value)
        except _GivenTwice as error:
            raise NotText(f"{value!r}: {error.problem}") from error
        except yaml.YAMLError as error:
            raise NotText(
                f"{value!r} cannot be read as {{name: value, ...}}; quote names with special characters, as in "
                "{'[x]': value}"
            ) from error
    if not isinstance(value, Mapping):
        raise NotText(f"{value!r} must be a mapping, as in {{name: value, ...}}")
    return {_text(_spelled(key)): one for key, one in value.items()}


def _spelled(value: Any) -> Any:
    """Return the text `null` for the loader's None."""
    return "null" if value is None else value


TEXT, TEXTS = Kind("text", _text), Kind("list of texts", _texts)
PATH = Kind("path", _path)
_KINDS: dict[Any, Kind] = {
    str: TEXT,
    Path: PATH,
    list[str]: TEXTS,
    dict[str, float]: Kind("{text: number, ...}", _shares),
    dict[str, str]: Kind("{text: text, ...}", _names),
}


def kind_of(annotation: Any) -> Kind | None:
    """Return the parser for a type of text, or a list or mapping of text; otherwise None."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [one for one in types if one is not NoneType]
    if set(found) == {str, list[str]}:  # one or several, which is for Python
        return TEXTS
    return next((kind for known, kind in _KINDS.items() if found == [known]), None)


def joined(words: Sequence[str], kinds: Mapping[str, Kind]) -> list[str]:
    """Return words of the command line with each text option joined to its value, so that nothing else parses it.

    All values of a list become one: `--user ann bob`, `--user ann --user bob` and `--user+ ann --user+ bob` are the
    same. A value may begin with a dash, unless it looks like an option; `--user=--ann` gives one that does.

    Args:
        words: The words.
        kinds: Parsers of text options by name, such as `--user`.
    """
    result: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, has_value, value = word.partition("=")
        kind = kinds.get(option.removesuffix("+")) if option.startswith("--") else None
        if kind is None:
            result.append(word)
        elif kind is TEXTS:
            found = lists.setdefault(option.removesuffix("+"), [])
            found += [value] if has_value else []
            while not has_value and rest and not _OPTION.fullmatch(rest[0]):
                found.append(rest.pop(0))
        elif not has_value and (not rest or _OPTION.fullmatch(rest[0])):
            result.append(word)  # argparse reports the missing value
        else:
            result.append(f"{option}={value if has_value else rest.pop(0)}")
    return result + [f"{option}={_MARK}{json.dumps(values)}" if values else option for option, values in lists.items()]


def given_twice(words: Sequence[str], kinds: Mapping[str, Kind]) -> str | None:
    """Return the error message for a list that is given in several places, or None.

    Args:
        words: Words of the command line, with configurations as `--config FILE`.
        kinds: Parsers of text options by name, such as `--user`.
    """
    places: dict[str, list[str]] = {option: [] for option, kind in kinds.items() if kind is TEXTS}
    for number, word in enumerate(words):
        option, has_value, value = word.partition("=")
        if option == "--config" and (has_value or number + 1 < len(words)):
            file = value if has_value else words[number + 1]
            for key in _keys(file):
                places.get(f"--{key}", []).append(file)
        elif (option := option.removesuffix("+")) in places and "the command line" not in places[option]:
            places[option].append("the command line")
    for option, found in places.items():
        if len(found) > 1:
            return f"{option} is given in {' and in '.join(found)}; only the last would count, so give all in one place"
    return None


def _keys(file: str) -> list[str]:
    """Return the options that a configuration sets; none if it is unreadable, which the parser then reports."""
    try:
        content = load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        try:
            content = load(file)  # jsonargparse takes the YAML itself too
        except yaml.YAMLError:
            return []
    return [key for key, value in content.items() if value is not None] if isinstance(content, dict) else []
