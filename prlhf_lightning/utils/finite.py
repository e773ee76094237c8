"""Checks for infinite and NaN values in weights and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prlhf_lightning.errors import NonFiniteError

_NAMED = 3


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor, or this process's shard of it, has an infinity or NaN.

    It synchronizes once per device, whatever the number of tensors.
    """
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and local.numel() and local.itemsize > 1:  # not the codes of a quantized weight
            flags.setdefault(local.device, []).append(local.detach().isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def named_not_finite(tensors: Mapping[str, Tensor], tables: Iterable[str] = (), users: Sequence[str] = ()) -> str:
    """Return the names of non-finite tensors, with the users of their non-finite rows; empty if all are finite.

    Args:
        tensors: Tensors by name.
        tables: Names of tensors with one row per user; row 0 is the generic user's.
        users: The users' ids, in the order of rows 1, 2, ...
    """
    if are_finite(tensors.values()):
        return ""
    wrong = [name for name, tensor in tensors.items() if not are_finite([tensor])]
    rows = set(tables)
    said = [name + (_whose(tensors[name], users) if name in rows else "") for name in wrong[:_NAMED]]
    return ", ".join(said) + (f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")


def check_finite(checkpoint: Mapping[str, Any], source: str, with_optimizer: bool = False) -> None:
    """Reject a checkpoint with non-finite weights; earlier versions may have saved such weights.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name, for the message.
        with_optimizer: Also check the optimizer's state, which training would continue with.

    Raises:
        NonFiniteError: A value is infinite or NaN.
    """
    if wrong := wrong_numbers(checkpoint, with_optimizer):
        raise NonFiniteError(
            f"{source} has infinite or NaN values: {wrong}. Its training diverged; use an earlier checkpoint."
        )


def wrong_numbers(checkpoint: Mapping[str, Any], with_optimizer: bool = False) -> str:
    """Return the names of non-finite tensors of a checkpoint (see `named_not_finite`); empty if all are finite."""
    entry = checkpoint.get("prlhf_lightning") or {}
    found = checkpoint.get("state_dict") or {}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    wrong = named_not_finite(tensors, entry.get("new_rows") or (), entry.get("users") or ())
    if wrong or not with_optimizer:
        return wrong
    states = [state for each in checkpoint.get("optimizer_states") or () for state in each.get("state", {}).values()]
    values = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return "" if are_finite(values) else "the optimizer's averages"


def _whose(table: Tensor, users: Sequence[str]) -> str:
    if isinstance(table, DTensor):
        return ""
    rows = (~table.detach().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    names = [
        "the generic user" if row == 0 else f"user {users[row - 1]!r}" for row in rows[:_NAMED] if row <= len(users)
    ]
    return f" ({', '.join(names)}{', ...' if len(rows) > _NAMED else ''})" if names else ""
