"""Finding and reading checkpoints, with errors that say what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning import checkpoint_files
from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.inference import PersonalizedWriter
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.modules.checkpoint_content import entry_of, tokenization_of
from prlhf_lightning.policies import CausalLMPolicy


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
        content: dict[str, Any] = checkpoint_files.load(path, weights_only=weights_only, mmap=True)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{option}: {error}") from error
    try:
        entry_of(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {path}: {error}") from error
    return content


def last_checkpoint(root: str | Path) -> Path | None:
    """Return the newest intact checkpoint of the newest run that has any, or None where no run has.

    Where newer ones are damaged, a warning names them and the one that is returned. Those of earlier runs, which may
    have been about something else, do not stand in for them.

    Args:
        root: The folder of all runs.

    Raises:
        DamagedCheckpointError: The newest run has none that is intact.
    """
    runs = {folder for depth in ("", "*/", "*/*/") for folder in Path(root).glob(f"{depth}checkpoints")}
    newest = {files[0]: folder for folder in runs if (files := checkpoint_files.in_order(folder))}
    if not newest:
        return None
    run = newest[max(newest, key=lambda path: path.stat().st_mtime_ns)]
    chosen = checkpoint_files.newest_intact(run)
    files = checkpoint_files.in_order(run)
    damaged = [str(path) for path in (files[: files.index(chosen)] if chosen else files)]
    if chosen is None:
        raise DamagedCheckpointError(
            f"ckpt_path: no checkpoint of the last run is intact ({', '.join(damaged)}). Name one of an earlier run by "
            "its path, or start anew without --ckpt_path."
        )
    if damaged:
        rank_zero_warn(f"Damaged: {', '.join(damaged)}. The newest intact checkpoint of that run is used: {chosen}")
    return chosen


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


def open_writer(path: str | Path, option: str = "model", device: str | torch.device = "cpu") -> PersonalizedWriter:
    """Load a model to write with.

    Args:
        path: A folder that `export` wrote, or a checkpoint that the command line trained.
        option: What the user called the path, for messages.
        device: Where the model goes.

    Raises:
        ConfigurationError: It is neither, or its policy is no Hugging Face model.
    """
    path = Path(path)
    if path.is_dir():
        try:
            return PersonalizedWriter.from_folder(path, device)
        except ConfigurationError as error:
            raise ConfigurationError(f"{option}: {error}") from error
    return writer_of(load_module(path, option).to(device), path, option)


def writer_of(module: PersonalizedLM, path: str | Path, option: str = "model") -> PersonalizedWriter:
    """Return a writer with the model of a checkpoint, which it shares.

    Args:
        module: The model.
        path: The checkpoint that it was loaded from.
        option: What the user called the path, for messages.

    Raises:
        ConfigurationError: Its policy is no Hugging Face model.
    """
    policy = module.policy
    if not isinstance(policy, CausalLMPolicy) or module.vocabulary is None:
        raise ConfigurationError(
            f"{option}: the policy of {path} is a {type(policy).__name__}; only CausalLMPolicy can be written with."
        )
    tokenization = tokenization_of(read_checkpoint(path, option))
    name = policy.name.rpartition("/")[2].removeprefix("builtin:")
    return PersonalizedWriter(policy.lm, policy.tokenizer, module.user_model, module.vocabulary, name, tokenization)


def pick_device(device: str) -> str:
    """Return a device that can be used; `auto` is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigurationError(f"device: {device!r} can't be used here: {error}") from error
    return device
