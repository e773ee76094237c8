"""Whether a model can be where its name says, before anything is loaded or asked for over a network."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path

from huggingface_hub import constants

_log = logging.getLogger(__name__)
#: What one of which is in a folder that `from_pretrained` reads.
_FILES = {"weights": ["config.json", "adapter_config.json"], "tokenizer": ["*token*", "vocab*", "*.model"]}
#: How the hub's oldest names begin, which have no owner.
_WITHOUT_OWNER = ("gpt2", "distil", "openai-gpt", "ctrl", "bert-", "roberta-", "xlnet-", "xlm-")


def problem_with(path: str, what: str) -> str | None:
    """Return why nothing can be loaded from a path or hub name; else say so where the hub is going to be asked.

    Args:
        path: A folder, or a hub name.
        what: What is to be loaded: `weights` or `tokenizer`.
    """
    folder = Path(path)
    if folder.exists():
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _FILES[what]):
            return f"the folder holds no {what} ({' or '.join(_FILES[what])})"
        return None
    if path.startswith((".", "/")) or path.count("/") > 1:  # no name on the hub
        return "there is no such folder"
    if "/" not in path and not path.startswith(_WITHOUT_OWNER):
        return "there is no such folder, and a name on the hub has an owner, as in `owner/model`"
    if folder.parent.is_dir() and folder.parent != Path():
        warnings.warn(f"There is no folder {path}: looking for it on the hub.", stacklevel=2)
    elif not constants.HF_HUB_OFFLINE:
        _announce(path)
    return None


@cache  # once for weights and tokenizer
def _announce(path: str) -> None:
    _log.warning("Asking the hub for %s, which takes a minute to fail where it can't be reached.", path)
