"""What the processes of a run tell one another, and what they agree on without a word."""

from __future__ import annotations

from hashlib import blake2b
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")


def ddp_wrapper(trainer: Trainer) -> DistributedDataParallel | None:
    """Return DDP's wrapper of what is trained, where several processes train it with DDP."""
    model = trainer.strategy.model
    return model if trainer.world_size > 1 and isinstance(model, DistributedDataParallel) else None


def holds_whole_model(trainer: Trainer) -> bool:
    """Return whether each process has all of the model, so that it may use it without the others.

    Where each holds a part, one that does, or one that leaves the model alone, leaves the others waiting.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    return trainer.world_size == 1 or whole


def mean_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, which all must call this."""
    mean: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
    return mean


def sum_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, which all must call this."""
    total: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total


def all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked; Lightning's own way of it prints torch's deprecation warning."""
    gathered = tensor.new_empty(torch.distributed.get_world_size(), *tensor.shape)
    torch.distributed.all_gather(list(gathered.unbind()), tensor)
    return gathered


def gather_objects(trainer: Trainer, value: _T) -> list[_T]:
    """Return what each process has, this one's alone where there is one; all processes must call this."""
    gathered = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def stable_hash(text: str) -> int:
    """Return an int64 that stands for a text on every process and in every run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
