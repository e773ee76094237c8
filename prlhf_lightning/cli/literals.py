"""Arguments of the command line that are text: ids, prompts, names and paths are taken as they stand, never as YAML."""

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

#: The parser mode in which a configuration file's scalars are the text that stands there, whatever YAML makes of it.
MODE = "literal"
# Before a list that the command line gave: NUL can be neither in an argument of a process nor in YAML.
_MARK = "\0"
_OPTION = re.compile(r"--[A-Za-z][\w.-]*\+?(=.*)?|--", re.DOTALL)


@dataclass(frozen=True)
class Kind:
    """How an argument that is text is read.

    Attributes:
        name: What the help calls it.
        read: Returns the value of what the command line, a configuration file or Python gave.
    """

    name: str
    read: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        """Read a value; one that was read already stays as it is."""
        return self.read(value)

    def __repr__(self) -> str:
        return self.name


class _GivenTwice(yaml.constructor.ConstructorError):  # type: ignore[misc]
    """A mapping has a key twice."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads every plain scalar as a string, but for `null`: 007, 1e3, yes and 2024-01-01 stay what they are."""

    yaml_implicit_resolvers = {"n": [("tag:yaml.org,2002:null", re.compile("null$"))]}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; one with a key twice is refused, since YAML would drop what stands first."""
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
    """Return what YAML holds: strings, lists, mappings, and None where it says `null`."""
    return yaml.load(text, Loader=_Loader)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes paths as the text that they are."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def dump(data: Any) -> str:
    """Return YAML that `load` reads back."""
    return str(yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, dump)


class NotText(ArgumentTypeError, ValueError):
    """What was given for an argument that is text is none; the message says what is wrong with it."""


def _text(value: Any) -> str:
    """Return a text as it stands."""
    if not isinstance(value, str):
        raise NotText(f"this is a {type(value).__name__}, and must be one text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotText(f"{value!r} is not valid UTF-8") from error
    return value


def _path(value: Any) -> Path:
    """Return a path; an empty one would be the current folder, which nobody who leaves it empty means."""
    if isinstance(value, Path):
        return value
    text = _text(value)
    if not text.strip() or "\0" in text:
        raise NotText(f"{text!r} is no path; name a file or folder, or leave the option out")
    return Path(text)


def _texts(value: Any) -> list[str]:
    """Return a list of texts, each as it stands: of the command line, of a configuration file, or of Python."""
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
                f"{value!r} can't be read as {{name: value, ...}}; put names with other signs in quotes, as in "
                "{'[x]': value}"
            ) from error
    if not isinstance(value, Mapping):
        raise NotText(f"{value!r} must be a mapping, as in {{name: value, ...}}")
    return {_text(_spelled(key)): one for key, one in value.items()}


def _spelled(value: Any) -> Any:
    """Return `null` for what the loader made of just that word."""
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
    """Return how an argument of a type is read where it is text, or a list or mapping of text; else None."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [one for one in types if one is not NoneType]
    if set(found) == {str, list[str]}:  # one or several, which is for Python
        return TEXTS
    return next((kind for known, kind in _KINDS.items() if found == [known]), None)


def joined(words: Sequence[str], kinds: Mapping[str, Kind]) -> list[str]:
    """Return words of the command line with each text option joined to its value, so that nothing else reads it.

    All values of a list become one: `--user ann bob`, `--user ann --user bob` and `--user+ ann --user+ bob` are the
    same. A value may begin with a dash, unless it looks like an option; `--user=--ann` gives one that does.

    Args:
        words: The words.
        kinds: How text options are read, by their names, such as `--user`.
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
            result.append(word)  # argparse says that it needs a value
        else:
            result.append(f"{option}={value if has_value else rest.pop(0)}")
    return result + [f"{option}={_MARK}{json.dumps(values)}" if values else option for option, values in lists.items()]


def given_twice(words: Sequence[str], kinds: Mapping[str, Kind]) -> str | None:
    """Return what to say of a list that is given in several places, of which only the last would count, or None.

    Args:
        words: Words of the command line, with configurations as `--config FILE`.
        kinds: How text options are read, by their names, such as `--user`.
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
    """Return which options a configuration sets; none if it can't be read, which the parser then says."""
    try:
        content = load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        try:
            content = load(file)  # jsonargparse takes the YAML itself too
        except yaml.YAMLError:
            return []
    return [key for key, value in content.items() if value is not None] if isinstance(content, dict) else []
