"""Whether a model or a data set can be where its name says, before anything is loaded or asked for over a network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from prlhf_lightning.errors import ConfigurationError

_log = logging.getLogger(__name__)
#: What one of which is in a folder that `from_pretrained` reads.
_FILES = {
    "weights": ["config.json", "adapter_config.json"],
    "tokenizer": ["*token*", "vocab*", "*.model"],
    "data": ["*"],
}
_DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt"}
#: How the hub's oldest names begin, which have no owner.
_WITHOUT_OWNER = ("gpt2", "distil", "openai-gpt", "ctrl", "bert-", "roberta-", "xlnet-", "xlm-")


def problem_with(path: str, what: Literal["weights", "tokenizer", "data"]) -> str | None:
    """Return why nothing can be loaded from a path or hub name; else say so where the hub is going to be asked.

    Args:
        path: A folder, or a hub name.
        what: What is to be loaded.
    """
    folder = Path(path)
    if folder.exists():
        if not folder.is_dir():
            return "that is a file, and no folder"
        if not any(any(folder.glob(name)) for name in _FILES[what]):
            return f"the folder holds no {what} ({' or '.join(_FILES[what])})"
        return None
    if path.startswith((".", "/", "~")) or path.count("/") > 1:  # no name on the hub
        return "there is no such folder"
    if what == "data":
        if folder.suffix in _DATA_FILES:
            return "there is no such file"
    elif "/" not in path and not path.startswith(_WITHOUT_OWNER):  # old data sets without an owner are many
        return "there is no such folder, and a name on the hub has an owner, as in `owner/model`"
    if folder.parent.is_dir() and folder.parent != Path():
        warnings.warn(f"There is no folder {path}: looking for it on the hub.", stacklevel=2)
    elif not constants.HF_HUB_OFFLINE:
        _announce(path)
    return None


@contextmanager
def loading(path: str, what: Literal["weights", "tokenizer"], told: str) -> Iterator[None]:
    """Name the setting where what a block loads from a path or hub name is not there, or can't be read.

    Args:
        path: A folder, or a hub name.
        what: What is to be loaded.
        told: The beginning of the error, to which the cause is added.

    Raises:
        ConfigurationError: It can't be loaded.
    """
    if (problem := problem_with(path, what)) is not None:
        raise ConfigurationError(f"{told} Cause: {problem}")
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"{told} Cause: {str(error).partition(chr(10))[0]}") from error


@cache  # once for weights and tokenizer
def _announce(path: str) -> None:
    _log.warning("Asking the hub for %s, which takes a minute to fail where it can't be reached.", path)
