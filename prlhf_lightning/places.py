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
from prlhf_lightning.model_files import gguf_problem, problem_in

_log = logging.getLogger(__name__)
#: What one of which is in a folder that `from_pretrained` reads.
_FILES = {
    "weights": ["config.json", "adapter_config.json"],
    "config": ["config.json"],
    "tokenizer": ["*token*", "vocab*", "*.model"],
    "data": ["*"],
}
_DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt"}
_LONGEST = 500  # characters of a cause
#: How the hub's oldest names begin, which have no owner.
_WITHOUT_OWNER = ("gpt2", "distil", "openai-gpt", "ctrl", "bert-", "roberta-", "xlnet-", "xlm-")


def problem_with(path: str, what: Literal["weights", "config", "tokenizer", "data"]) -> str | None:
    """Return why nothing can be loaded from a path or hub name; else say so where the hub is going to be asked.

    Args:
        path: A folder, or a hub name.
        what: What is to be loaded.
    """
    folder = Path(path)
    if folder.exists():
        if not folder.is_dir():
            return gguf_problem(folder) if folder.suffix == ".gguf" else "that is a file, and no folder"
        if not any(any(folder.glob(name)) for name in _FILES[what]):
            gguf = sorted(folder.glob("*.gguf"))
            return f"the folder holds no {what} ({' or '.join(_FILES[what])})" + (
                f"; {gguf_problem(gguf[0])}" if gguf else ""
            )
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
def loading(path: str, what: Literal["weights", "config", "tokenizer"], name: str, fix: str) -> Iterator[None]:
    """Name the setting where what a block loads from a path or hub name is not there, or can't be read.

    Args:
        path: A folder, or a hub name.
        what: What is to be loaded.
        name: The setting and what it names, with which the error begins.
        fix: What to do where it can't be read.

    Raises:
        ConfigurationError: It can't be loaded, or the block has found that it can't be used.
    """
    told = f"{name} could not be loaded; {fix} Cause:"
    if (problem := problem_with(path, what)) is not None:
        raise ConfigurationError(f"{told} {problem}")
    try:
        if Path(path).is_dir() and (problem := problem_in(Path(path), what)) is not None:
            raise ConfigurationError(problem)
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{name} can't be used: {error}") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # Libraries fail in ways of their own over files that are not what they should be; Rust's panics are no `Exception`.
    except BaseException as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # about which others know more
            raise
        raise ConfigurationError(f"{told} {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return what an error says, in a line."""
    first, _, rest = str(error).strip().partition("\n")
    if first.startswith("Weights only load failed"):
        return "a .bin file is damaged, or holds code beside weights; take the model's .safetensors files"
    if "contains custom code" in first:
        return (
            "it comes with code of its own; where you trust it, set trust_remote_code (`--trust_remote_code true`), or "
            "for `validate`, `test` and `predict` name the run's configuration, which sets it, with --config"
        )
    if first.endswith(":"):  # what is wrong stands in the next line
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    first = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
    # A name alone, as of a key that is missing, says little.
    is_said = " " in first or isinstance(error, OSError | ValueError)
    return first if is_said else f"a file is damaged or of another format ({type(error).__name__}: {first})"


@cache  # once for weights and tokenizer
def _announce(path: str) -> None:
    _log.warning("Asking the hub for %s, which takes a minute to fail where it can't be reached.", path)
