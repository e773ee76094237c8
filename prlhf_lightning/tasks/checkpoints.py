"""Reading checkpoints, with errors that say what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM


def read_checkpoint(path: str | Path, option: str, weights_only: bool = True) -> dict[str, Any]:
    """Return what a checkpoint holds, or say why it can't be read; tensors stay on disk.

    Args:
        path: A file, or the folder that a sharded strategy writes, of which nothing is read.
        option: What the user called the path, for messages.
        weights_only: Refuse files that hold code.
    """
    path = Path(path)
    if path.is_dir():
        return {}
    if not path.is_file():
        raise ConfigurationError(f"{option}: there is no checkpoint {path}; give a .ckpt file of an earlier run.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except UnpicklingError as error:
        raise ConfigurationError(
            f"{option}: {path} holds more than weights and settings, which could run code. If you trust its source, "
            f"load it in Python, with `weights_only=False`. Cause: {error}"
        ) from error
    except (RuntimeError, EOFError) as error:  # not a zip file, or a part of one
        raise ConfigurationError(f"{option}: {path} is damaged, or no checkpoint; give a .ckpt file.") from error
    return content


def load_module(path: str | Path, option: str) -> PersonalizedLM:
    """Rebuild the model of a checkpoint, with its weights and users, on the CPU.

    Args:
        path: A checkpoint that the command line trained.
        option: What the user called the path, for messages.
    """
    if "policy" not in read_checkpoint(path, option).get("hyper_parameters", {}):
        raise ConfigurationError(
            f"{option}: {path} does not say which user model, policy and loss it holds, as checkpoints of `fit` do. Of "
            "a module built in code, load it there: PersonalizedLM.load_from_checkpoint(path, user_model=..., "
            "policy=..., loss=...)."
        )
    return PersonalizedLM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
