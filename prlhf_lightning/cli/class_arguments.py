"""Arguments of a class that a later option or file replaces by another class."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import signature
from typing import Any

from jsonargparse import _typehints  # there is no public place
from jsonargparse._util import import_object

_told: set[str] = set()


def begin_other_classes_anew() -> None:
    """Make jsonargparse start a replacing class from its own defaults, and print the dropped arguments.

    Otherwise it silently keeps arguments with the same name: IPO with the `beta` of DPO, which has another meaning
    there, or a model without users with the soft prompt's length of one with users.
    """
    _typehints.discard_init_args_on_class_path_change = _begin_anew


def _begin_anew(parser_or_action: Any, before: Any, now: Any) -> None:
    if not before or not before.get("init_args") or not before.get("class_path") or not now.get("class_path"):
        return
    if _is_same(before["class_path"], now["class_path"]):
        return
    arguments = before["init_args"]
    given = dict(_given(before["class_path"], arguments))
    before["init_args"] = type(arguments)()
    if given:
        old, new = (path.rpartition(".")[2] for path in (before["class_path"], now["class_path"]))
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        _tell(
            f"{new} takes the place of {old}, and starts from its own defaults. Not kept from {old}: {shown}. Give "
            f"what should hold for {new} after its name.\n"
        )


def _tell(message: str) -> None:
    if message not in _told:  # a configuration is read more than once
        _told.add(message)
        sys.stderr.write(message)


def _given(class_path: str, arguments: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arguments that differ from the class's defaults."""
    defaults = _defaults(class_path)
    for name, value in (arguments if isinstance(arguments, dict) else vars(arguments)).items():
        if name not in defaults or value != defaults[name]:
            yield name, value.as_dict() if hasattr(value, "as_dict") else value


def _defaults(class_path: str) -> dict[str, Any]:
    try:
        parameters = signature(import_object(class_path)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _is_same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return bool(import_object(one) is import_object(other))  # a class may have several paths
    except (ImportError, AttributeError, ValueError):
        return False
