"""Lookup of the configurations in the package, usable from any folder: `fit --config p_dpo.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import prlhf_lightning

_PACKAGE = Path(prlhf_lightning.__file__).parent
#: In a wheel the configurations are in the package, in a checkout next to it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_OPTIONS = ("-c", "--config")


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Return the words of a command with full paths of the named shipped configurations.

    A file of that name in the current folder comes first.

    Args:
        words: The words, such as `fit --config overrides/fsdp2.yaml`.
    """
    found = list(words)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _OPTIONS and equals:
            found[place] = f"{name}={_located(value)}"
        elif place and words[place - 1] in _OPTIONS:
            found[place] = _located(word)
    return found


def _located(path: str) -> str:
    if Path(path).exists() or Path(path).is_absolute():
        return path
    shipped = (folder / path.removeprefix("configs/") for folder in _FOLDERS)
    return next((str(one) for one in shipped if one.is_file()), path)
