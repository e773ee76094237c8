"""Warm start: a new training from the weights and users of an earlier one, with a new optimizer and new data."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.policies import Policy
from prlhf_lightning.policies.loading import warning_of_other_base
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of, is_reward_model, users_of
from prlhf_lightning.training.checkpoint_schema import check_content
from prlhf_lightning.training.checkpointing import (
    base_of,
    names_of,
    trained_names,
    warn_of_other_id_key,
    warn_of_other_rendering,
)
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.utils.finite import check_finite
from prlhf_lightning.utils.hashing import SETTINGS, check_checksums

_NAMED = 3  # users
#: The files of a folder that `export` wrote.
_USERS, _WEIGHTS, _ADAPTERS = "users.json", "user_model.safetensors", "adapter_config.json"
_ADAPTER = r"\.lora_([AB])\.weight$"  # a name in PEFT's file, without the adapter's name
#: Settings of `CausalLMPolicy` that change the function of its weights.
_OF_POLICY = ("random_init", "lora")
_OF_LORA = ("rank", "alpha", "target_modules")  # dropout acts only in training


@dataclass(frozen=True)
class WarmStart:
    """The weights and users of an earlier training, and the settings that they require.

    Attributes:
        source: Their origin, for messages.
        users: The users, in the order of the tables' rows.
        weights: Trained weights by their names in a `PersonalizedLM`.
        policy: `class_path` and `init_args` of the policy, as far as known.
        user_model: The same of the user model.
        tokenization: Tokenization settings of its data.
        base: `base_of` that policy, as far as known.
        origin: `checkpoint_files.origin` of the source.
        id_key: `id_key_of` its training data, as far as known.
    """

    source: str
    users: UserVocabulary
    weights: Mapping[str, Tensor]
    policy: Mapping[str, Any] = field(default_factory=dict)
    user_model: Mapping[str, Any] = field(default_factory=dict)
    tokenization: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, str] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    id_key: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the warm start of a checkpoint, or of an exported folder; checkpoint tensors are memory-mapped.

        Args:
            path: The checkpoint, the folder of its run, or the folder that `export` wrote.

        Raises:
            ConfigurationError: There is no such file, or it was not written by this package.
            DamagedCheckpointError: The file is damaged.
        """
        path = Path(path).expanduser()
        if (path / SETTINGS).is_file():
            return cls._of_folder(path)
        path = checkpoint_files.checkpoint_of(path, "init_from")
        if path.is_dir():
            found = checkpoint_files.newest_intact(path)
            instead = f"its checkpoint {found}" if found else "a .ckpt file that `fit` wrote"
            raise ConfigurationError(f"init_from: {path} is no folder that `export` wrote; give {instead}.")
        if not path.is_file():
            raise ConfigurationError(f"init_from: there is no checkpoint {path}; give a .ckpt file of an earlier run.")
        try:
            content: dict[str, Any] = checkpoint_files.load(path, mmap=True)
            entry, users = entry_of(content), users_of(content)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"init_from: {error}") from error
        except ConfigurationError as error:
            raise ConfigurationError(f"init_from: {path}: {error}") from error
        try:
            check_content(content)
        except ConfigurationError as error:
            raise ConfigurationError(f"init_from: {path}: {error}") from error
        if is_reward_model(content):
            raise ConfigurationError(
                f"init_from: {path} is a reward model, with which no policy can start; give a policy's checkpoint."
            )
        check_finite(content, f"init_from: {path}")
        settings = content.get("hyper_parameters", {})
        # The state of a loss belongs to its own training: the new one may have another loss.
        weights = {k: v for k, v in content["state_dict"].items() if k.startswith(("policy.", "user_model."))}
        policy, user_model = (settings.get(part) or {} for part in ("policy", "user_model"))
        rendered, origin = entry.get("tokenization") or {}, checkpoint_files.origin(path)
        return cls(
            str(path), users, weights, policy, user_model, rendered, entry.get("base"), origin, entry.get("id_key")
        )

    @classmethod
    def _of_folder(cls, folder: Path) -> Self:
        """Read an exported folder: users and adapters; a merged model is the base of the new training."""
        try:
            settings, ids = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SETTINGS, _USERS))
            weights = {f"user_model.{name}": value for name, value in load_file(folder / _WEIGHTS).items()}
            base: dict[str, Any] = {"model": str(folder)}
            identity = None  # a merged model has no other base
            if (folder / _ADAPTERS).is_file():
                lora = json.loads((folder / _ADAPTERS).read_text(encoding="utf-8"))
                identity = settings.get("base_identity")
                base = {"model": settings["base"], "lora": {"rank": lora["r"], "alpha": lora["lora_alpha"]}}
                for name, value in load_file(folder / "adapter_model.safetensors").items():
                    weights["policy.model." + re.sub(_ADAPTER, r".lora_\1.default.weight", name)] = value
            users, user_model = UserVocabulary(ids["users"]), settings["user_model"]
            check_checksums(folder, settings)
        except ConfigurationError as error:
            raise ConfigurationError(f"init_from: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigurationError(f"init_from: {folder} can't be read ({error}); export it again.") from error
        check_finite({"state_dict": weights}, f"init_from: {folder}")
        rendered = settings.get("tokenization") or {}
        origin = checkpoint_files.origin(folder)
        return cls(str(folder), users, weights, {"init_args": base}, user_model, rendered, identity, origin)

    def check(self, policy: Policy, user_model: UserModel) -> None:
        """Refuse a policy or a user model other than the one of the earlier training.

        Raises:
            ConfigurationError: Names each setting that differs, with both values.
        """
        differences = [*self._of_policy(policy), *_of_component("model.user_model", self.user_model, user_model)]
        if differences:
            raise ConfigurationError(
                f"init_from: {self.source} was trained with other settings than these: {'; '.join(differences)}. Use "
                "those it was trained with (the config.yaml of its run has them)."
            )

    def users_with(self, of_data: UserVocabulary) -> UserVocabulary:
        """Return the earlier users in their rows, followed by the new users of the data."""
        new = [user_id for user_id in of_data.ids if user_id not in self.users]
        absent = sum(user_id not in of_data for user_id in self.users.ids)
        named = ", ".join(map(repr, new[:_NAMED])) + (", ..." if len(new) > _NAMED else "")
        rank_zero_info(
            f"Starting from {self.source}: {len(self.users) - 1} users keep their rows ({absent} of them have no votes "
            f"in these data), and {len(new)} new users start as the generic user{f' ({named})' if new else ''}. "
            "Optimizer and schedule are new."
        )
        return UserVocabulary([*self.users.ids, *new])

    def check_rendering(self, settings: Mapping[str, Any]) -> None:
        """Warn if rows are rendered differently from the rows that the weights were trained on.

        Args:
            settings: Tokenization settings of the new data.
        """
        warn_of_other_rendering(f"init_from: {self.source}", self.tokenization, settings)

    def check_id_key(self, now: str | None) -> None:
        """Warn if user ids are hashed differently from the source; `now` is `id_key_of` the new data."""
        warn_of_other_id_key(f"init_from: {self.source}", self.id_key, now)

    def warn_of_other_base(self, policy: Policy) -> None:
        """Warn if the policy, which must be built, has other base weights than the earlier training."""
        if warning := warning_of_other_base(self.base, base_of(policy), str(getattr(policy, "name", ""))):
            rank_zero_warn(f"init_from: {warning}")

    @torch.no_grad()
    def load_into(self, module: nn.Module, user_model: UserModel, users: UserVocabulary) -> None:
        """Load the weights into a module; additional users get the row of a new user.

        Args:
            module: The module, built for `users`.
            user_model: Its user model.
            users: The result of `users_with`.

        Raises:
            ConfigurationError: The weights do not fit.
        """
        weights = dict(self.weights)
        names = [name for name in names_of(module, user_model.row_tables()) if name in weights]
        added = len(users) - len(self.users)
        if added and len(names) == len(user_model.row_tables()):
            for name, row in zip(names, user_model.new_rows([weights[name] for name in names]), strict=True):
                weights[name] = torch.cat([weights[name], row.expand(added, *row.shape)])
        # The loss starts fresh. So does the policy if the source holds no weights of it, since it is the base.
        kept = ("loss.",) if any(name.startswith("policy.") for name in weights) else ("loss.", "policy.")
        trained = trained_names(module)
        own = {k: v for k, v in module.state_dict().items() if k.startswith(kept) and k in trained}
        try:
            module.load_state_dict({**own, **weights})
        except ConfigurationError as error:
            raise ConfigurationError(f"init_from: {self.source}: {error}") from error

    def _of_policy(self, policy: Policy) -> Iterator[str]:
        if not self.policy:
            return
        yield from _other_class("model.policy", self.policy, policy)
        before: Mapping[str, Any] = self.policy.get("init_args") or {}
        base, here = before.get("model"), getattr(policy, "name", None)
        if base == self.source != here:
            raise ConfigurationError(
                f"init_from: {base} holds a merged model, on which new adapters are trained: set model.policy.model to "
                "it as well, or start from the run's checkpoint, to train its adapters further."
            )
        if base and here and Path(base).expanduser().resolve() != Path(here).expanduser().resolve():
            yield (
                f"model.policy.model is {base!r} there and {here!r} here (if the same model has moved, write its new "
                "place into the checkpoint with the `relocate` command)"
            )
        for name in _OF_POLICY:
            if name in before and hasattr(policy, name):
                yield from _other_value(f"model.policy.{name}", before[name], getattr(policy, name))


def _of_component(name: str, spec: Mapping[str, Any], component: nn.Module) -> Iterator[str]:
    """Yield the differences between the settings of a component in a checkpoint and a live one."""
    if not spec:
        return
    if other := list(_other_class(name, spec, component)):
        yield from other
        return
    before: Mapping[str, Any] = spec.get("init_args") or {}
    for key in signature(type(component).__init__).parameters:
        if key not in before or not hasattr(component, key):
            continue
        then, now = before[key], getattr(component, key)
        if isinstance(now, nn.ModuleList) and isinstance(then, list):
            if len(then) != len(now):
                yield f"{name}.{key} are {len(then)} there and {len(now)} here"
                continue
            for number, (one, part) in enumerate(zip(then, now, strict=True)):
                yield from _of_component(f"{name}.{key}[{number}]", one, part)
        else:
            yield from _other_value(f"{name}.{key}", then, now)


def _other_class(name: str, spec: Mapping[str, Any], component: object) -> Iterator[str]:
    path, here = str(spec.get("class_path", "")), type(component)
    if path.rpartition(".")[2] not in ("", here.__name__):
        yield f"{name} is {path.rpartition('.')[2]} there and {here.__name__} here"


def _other_value(name: str, then: Any, now: Any) -> Iterator[str]:
    then, now = (
        asdict(value) if is_dataclass(value) and not isinstance(value, type) else value for value in (then, now)
    )
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys: Collection[str] = _OF_LORA if name.endswith(".lora") else list(then)
        for key in keys:
            if key in then and key in now:
                yield from _other_value(f"{name}.{key}", then[key], now[key])
    elif isinstance(then, str | int | float | bool | list | tuple | Mapping | None) and then != now:
        yield f"{name} is {_shown(then)} there and {_shown(now)} here"


def _shown(value: Any) -> str:
    return "null" if value is None else "set" if isinstance(value, Mapping) else repr(value)
