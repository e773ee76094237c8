"""The schema of a checkpoint's content, checked before use, since a file may come from anyone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.checkpoint_entry import KEY

_FIX = "use a checkpoint that `fit` wrote"


def check_content(content: Mapping[str, Any]) -> None:
    """Raise if a checkpoint does not follow the schema, or would take more memory than its file has bytes.

    Args:
        content: Content of a checkpoint with an entry of this package (`entry_of`).

    Raises:
        ConfigurationError: Names the malformed part.
    """
    for name, tensor in _tensors(content, ""):
        is_plain = tensor.layout is torch.strided and tensor.device.type != "meta"
        if not is_plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ConfigurationError(f"{name} has shape {list(tensor.shape)}; the file holds fewer numbers; {_FIX}.")
    weights = _mapping(content.get("state_dict"), "state_dict", of=Tensor)
    _check_users(content[KEY], weights)
    _check_optimizers(content.get("optimizer_states") or [])
    settings = _mapping(content.get("hyper_parameters", {}), "hyper_parameters")
    for part in ("policy", "backbone", "user_model", "loss"):
        if part in settings and settings[part] is not None:
            _mapping(_mapping(settings[part], part).get("init_args") or {}, f"{part}.init_args")
    _check_rank(settings, weights)


def _check_users(entry: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    if not isinstance(entry.get("shrunk", 1.0), float):
        raise ConfigurationError(f"{KEY}.shrunk is no number; {_FIX}.")
    for part in ("tokenization", "base"):
        _mapping(entry.get(part) or {}, f"{KEY}.{part}", of=str if part == "base" else object)
    for name, row in _mapping(entry.get("new_rows", {}), f"{KEY}.new_rows", of=Tensor).items():
        if name not in weights or weights[name].dim() < 2 or weights[name].shape[1:] != row.shape:
            raise ConfigurationError(f"{KEY}.new_rows: {name} fits no table of users in state_dict; {_FIX}.")
        if not (row.is_floating_point() and weights[name].is_floating_point()):
            raise ConfigurationError(f"{name} holds no real numbers; {_FIX}.")
    if any(name not in weights for name in _list(entry.get("shares", []), f"{KEY}.shares")):
        raise ConfigurationError(f"{KEY}.shares names a table that is not in state_dict; {_FIX}.")


def _check_optimizers(optimizers: Any) -> None:
    for optimizer in _list(optimizers, "optimizer_states"):
        states = _mapping(_mapping(optimizer, "optimizer_states").get("state"), "optimizer_states.state")
        for state in states.values():
            _mapping(state, "optimizer_states.state")
        for group in _list(optimizer.get("param_groups"), "optimizer_states.param_groups"):
            for number in _list(_mapping(group, "param_groups").get("params"), "param_groups.params"):
                if not isinstance(number, int):
                    raise ConfigurationError(f"param_groups.params holds {type(number).__name__}; {_FIX}.")


def _check_rank(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    lora = ((settings.get("policy") or {}).get("init_args") or {}).get("lora")
    rank = lora.get("rank") if isinstance(lora, Mapping) else None
    ranks = [len(weight) for name, weight in weights.items() if ".lora_A." in name and weight.dim() == 2]
    if ranks and isinstance(rank, int | float) and rank > max(ranks):
        raise ConfigurationError(f"policy.lora.rank is {rank}, and its adapters have rank {max(ranks)}; {_FIX}.")


def _mapping(value: Any, name: str, of: type = object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} is of type {type(value).__name__}, and not a mapping; {_FIX}.")
    if other := [key for key, one in value.items() if not isinstance(one, of)]:
        raise ConfigurationError(f"{name}: {other[0]!r} is no {of.__name__}; {_FIX}.")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"{name} is of type {type(value).__name__}, and not a list; {_FIX}.")
    return list(value)


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint with their paths in it."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            if not isinstance(value, str | int | float):
                yield from _tensors(value, f"{name}.{number}")
