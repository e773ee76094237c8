"""Loading of trained models: checkpoints and exported folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.inference import Generator
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.training import PersonalizedLM, PersonalizedRewardModel
from prlhf_lightning.training.checkpoint_entry import is_reward_model
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.utils.hashing import SETTINGS
from prlhf_lightning.utils.load_errors import opening

_FIX = "Use a checkpoint that `fit` wrote, with the version that wrote it."


def load_module(
    path: str | Path, option: str, trust_remote_code: bool = False, trust_classes: Collection[str] | None = None
) -> PersonalizedLM:
    """Return the model of a checkpoint, with its weights and users, on the CPU.

    Args:
        path: A checkpoint that the command line trained.
        option: Name of the option, for messages.
        trust_remote_code: Run code that comes with the base model; the checkpoint's own value is ignored.
        trust_classes: Classes outside this package that the checkpoint may name.
    """
    return module_of(read_checkpoint(path, option), path, option, trust_remote_code, trust_classes)


def module_of(
    content: Mapping[str, Any],
    path: str | Path,
    option: str,
    trust_remote_code: bool = False,
    trust_classes: Collection[str] | None = None,
) -> PersonalizedLM:
    """Return the model of a checkpoint that has been read.

    Args:
        content: Result of `read_checkpoint`; it is not changed.
        path: Its path.
        option: Name of the option, for messages.
        trust_remote_code: Run code that comes with the base model; the checkpoint's own value is ignored.
        trust_classes: Classes outside this package that the checkpoint may name.
    """
    if content and is_reward_model(content):
        raise ConfigurationError(
            f"{option}: {path} is a reward model, which judges texts and writes none; this command needs a policy's "
            "checkpoint. See docs/reward_models.md for the commands that take reward models."
        )
    settings = content.get("hyper_parameters")
    if not isinstance(settings, dict) or not isinstance(settings.get("policy"), dict):
        raise ConfigurationError(
            f"{option}: {path} does not say which user model, policy and loss it holds, as checkpoints of `fit` do. Of "
            "a module built in code, load it there: PersonalizedLM.load_from_checkpoint(path, user_model=..., "
            "policy=..., loss=...)."
        )
    with opening(f"{option}: {path}", _FIX):
        base = str((settings["policy"].get("init_args") or {}).get("model", ""))
    _check_is_there(base, path, option)
    try:
        with opening(f"{option}: {path}", _FIX):
            return PersonalizedLM.from_content(content, trust_remote_code, trust_classes, f"{option}: {path}")
    except NonFiniteError as error:
        raise NonFiniteError(f"{option}: {path}: {error}") from error


def reward_model_of(
    content: Mapping[str, Any], path: str | Path, option: str, trust_classes: Collection[str] | None = None
) -> PersonalizedRewardModel:
    """Return the reward model of a checkpoint that has been read, on the CPU.

    Args:
        content: Result of `read_checkpoint`; it is not changed.
        path: Its path.
        option: Name of the option, for messages.
        trust_classes: Classes outside this package that the checkpoint may name.

    Raises:
        ConfigurationError: It does not say of which parts it was made, or its backbone has changed.
    """
    settings = content.get("hyper_parameters") or {}
    if not isinstance(settings.get("backbone"), dict):
        raise ConfigurationError(
            f"{option}: {path} does not say which user model and backbone it holds, as checkpoints of `fit` do. Of a "
            "module built in code, load it there: PersonalizedRewardModel.load_from_checkpoint(path, user_model=..., "
            "backbone=...)."
        )
    with opening(f"{option}: {path}", _FIX):
        _check_is_there(str((settings["backbone"].get("init_args") or {}).get("model", "")), path, option)
        return PersonalizedRewardModel.from_content(content, trust_classes, f"{option}: {path}")


def _check_is_there(base: str, path: str | Path, option: str) -> None:
    """Refuse a checkpoint whose base model is in a folder that does not exist."""
    if base.startswith(("/", ".", "~")) and not Path(base).expanduser().exists():
        raise ConfigurationError(
            f"{option}: {path} was trained on the base model {base}, which does not exist. Write its "
            f"new path: prlhf-lightning relocate --model {path} --base NEW_PATH --output moved.ckpt"
        )


def open_writer(
    path: str | Path,
    option: str = "model",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    trust_classes: Collection[str] | None = None,
) -> Generator:
    """Return a generator for a model.

    Args:
        path: A folder that `export` wrote, a checkpoint that the command line trained, or the folder of its run.
        option: Name of the option, for messages.
        device: Device of the model.
        trust_remote_code: Run code that comes with the base model; the file's own value is ignored.
        trust_classes: Classes outside this package that the file may name.

    Raises:
        ConfigurationError: It is neither, or its policy is no Hugging Face model.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir() and not (path / SETTINGS).is_file():
        path = checkpoint_of(path, option)
    if path.is_dir():
        try:
            return Generator.from_folder(path, device, trust_remote_code, trust_classes)
        except (ConfigurationError, NonFiniteError) as error:
            raise type(error)(f"{option}: {error}") from error
    return writer_of(load_module(path, option, trust_remote_code, trust_classes).to(device), path, option)


def writer_of(module: PersonalizedLM, path: str | Path, option: str = "model") -> Generator:
    """Return a generator that shares the model of a checkpoint.

    Args:
        module: The model.
        path: The checkpoint that it was loaded from.
        option: Name of the option, for messages.

    Raises:
        ConfigurationError: Its policy is no Hugging Face model.
    """
    policy = module.policy
    if not policy.writes:
        raise ConfigurationError(
            f"{option}: {path} is a reward model ({type(policy).__name__}), which writes no text: give a policy here, "
            "and the reward model to `score`, or as --reward_model to `generate --best_of` and `make-pairs`."
        )
    if not isinstance(policy, CausalLMPolicy) or module.vocabulary is None:
        raise ConfigurationError(
            f"{option}: the policy of {path} is a {type(policy).__name__}; only CausalLMPolicy can be written with."
        )
    name = policy.name.rpartition("/")[2].removeprefix("builtin:")
    return Generator(policy.lm, policy.tokenizer, module.user_model, module.vocabulary, name, module.tokenization)


def pick_device(device: str) -> str:
    """Return an available device; `auto` is the accelerator (CUDA, MPS, ...) if there is one."""
    if device == "auto":
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigurationError(f"device: {device!r} can't be used here: {error}") from error
    return device
