"""The user model in several processes: each holds a full copy, and only rows of users in the batch are exchanged.

DistributedDataParallel (DDP) would all-reduce a table's sparse gradient, which NCCL cannot do and gloo does slowly. So
DDP ignores the tables, and this module averages their gradients, at a cost that depends on the users in the batches and
not on the size of the table. With a sharded policy, this module averages the gradients of the whole user model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prlhf_lightning.user_models import UserModel


def sparse_tables(user_model: UserModel) -> list[Tensor]:
    """Return the user model's tables with sparse gradients; DDP handles the others."""
    is_sparse = {id(m.weight) for m in user_model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    return [table for table in user_model.row_tables() if id(table) in is_sparse]


def exclude_from_ddp(module: nn.Module, tables: Iterable[Tensor]) -> None:
    """Make DDP ignore tables when it wraps `module`, of which they are parameters."""
    ids = {id(table) for table in tables}
    names = [name for name, param in module.named_parameters() if id(param) in ids]
    # Not public, but torch's only way to exclude a parameter.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]


def broadcast_parameters(user_model: UserModel, alone: bool) -> None:
    """Broadcast the first process's user model to all; all processes must call this.

    Args:
        user_model: A user model that has been built.
        alone: Whether to broadcast all parameters, and not only the sparse tables.
    """
    whole = [*user_model.parameters(), *user_model.buffers()]
    for tensor in whole if alone else sparse_tables(user_model):
        torch.distributed.broadcast(tensor.data, src=0)


def average_gradients(user_model: UserModel, alone: bool, trainer: Trainer) -> None:
    """Replace the user model's gradients by their means over all processes; all processes must call this.

    Args:
        user_model: A user model after its backward pass.
        alone: As in `broadcast_parameters`.
        trainer: Its trainer.
    """
    tables = sparse_tables(user_model)
    average_sparse_gradients(tables, all_gather)
    if alone:
        ids = {id(table) for table in tables}
        dense = [p for p in user_model.parameters() if p.requires_grad and id(p) not in ids]
        average_dense_gradients(dense, partial(mean_over_processes, trainer))


@torch.no_grad()
def average_sparse_gradients(tables: Sequence[Tensor], all_gather: Callable[[Tensor], Tensor]) -> None:
    """Replace the tables' sparse gradients by their means over all processes.

    A process whose batch does not use a table has no gradient for it, which counts as zero. All processes must call
    this, and all get the same gradients.

    Args:
        tables: Parameters with sparse gradients over their rows, or none.
        all_gather: Returns a tensor of every process, stacked along a new first dimension.
    """
    if not tables:
        return
    grads = [_rows_and_values(table) for table in tables]
    own = torch.tensor([len(rows) for rows, _ in grads], device=tables[0].device)
    for table, grad, counts in zip(tables, grads, all_gather(own).T, strict=True):
        longest = int(counts.max())
        if longest == 0:
            continue
        # All processes must send blocks of one shape.
        padded = [torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])]) for part in grad]
        is_real = torch.arange(longest, device=counts.device) < counts[:, None]
        rows, values = (all_gather(part)[is_real] for part in padded)
        mean = torch.sparse_coo_tensor(rows[None], values / len(counts), table.shape, check_invariants=False)
        table.grad = mean.coalesce()


@torch.no_grad()
def average_dense_gradients(params: Sequence[Tensor], average: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters' gradients by their means over all processes; all processes must call this.

    A missing gradient counts as zero. Gradients that are equal in all processes do not change, so this may be called
    for every batch of an accumulation.

    Args:
        params: Parameters with dense gradients, or none.
        average: Returns the mean of a float32 tensor over all processes.
    """
    if not params:
        return
    # All in one message, since they are small; the flags mark parameters without a gradient in any process.
    flags = torch.tensor([float(param.grad is not None) for param in params], device=params[0].device)
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    message = average(torch.cat([flags, *(grad.flatten().float() for grad in grads)]))
    used, *means = torch.split(message, [len(params), *(param.numel() for param in params)])
    for param, mean, is_used in zip(params, means, used.tolist(), strict=True):
        if is_used:
            param.grad = mean.view_as(param).to(param.dtype)


def _rows_and_values(table: Tensor) -> tuple[Tensor, Tensor]:
    if table.grad is None:
        return torch.zeros(0, dtype=torch.long, device=table.device), table.new_zeros(0, *table.shape[1:])
    grad = table.grad.coalesce()
    return grad.indices()[0], grad.values()


_T = TypeVar("_T")


def ddp_wrapper(trainer: Trainer) -> DistributedDataParallel | None:
    """Return DDP's wrapper of the module, or None without DDP."""
    model = trainer.strategy.model
    return model if trainer.world_size > 1 and isinstance(model, DistributedDataParallel) else None


def holds_whole_model(trainer: Trainer) -> bool:
    """Return whether each process has the whole model, so that it may use it without the others.

    With a sharded model, a process that runs the model more or less often than the others makes them wait.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    return trainer.world_size == 1 or whole


def mean_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; all processes must call this."""
    mean: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
    return mean


def sum_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; all processes must call this."""
    total: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total


def all_gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked, without the deprecation warning of Lightning's function."""
    gathered = tensor.new_empty(torch.distributed.get_world_size(), *tensor.shape)
    torch.distributed.all_gather(list(gathered.unbind()), tensor)
    return gathered


def gather_objects(trainer: Trainer, value: _T) -> list[_T]:
    """Return the objects of all processes; all processes must call this."""
    gathered = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def stable_hash(text: str) -> int:
    """Return an int64 hash of a text that is the same in every process and run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
