"""The gradients of a step: their joint norm, sparse and sharded ones included, and clipping by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules.processes import sum_over_processes
from prlhf_lightning.modules.sharding import is_sharded
from prlhf_lightning.policies import Policy


@dataclass(frozen=True)
class StepParameters:
    """The parameters that a step moves.

    Attributes:
        whole: Those that this process has all of, with gradients that are the same everywhere.
        parts: Those of a sharded policy, of which it has a part.
    """

    whole: list[nn.Parameter]
    parts: list[nn.Parameter]

    @classmethod
    def of(cls, optimizer: Optimizer, policy: Policy) -> Self:
        """Return those of an optimiser that trains a policy, sharded or not, and a user model."""
        parts = list(policy.parameters()) if is_sharded(policy) else []
        ids = {id(param) for param in parts}
        return cls([p for group in optimizer.param_groups for p in group["params"] if id(p) not in ids], parts)

    @property
    def all(self) -> list[nn.Parameter]:
        """All of them."""
        return [*self.whole, *self.parts]

    def norm(self, trainer: Trainer, device: torch.device) -> Tensor:
        """Return the joint norm `[]` of their gradients; all processes must call this."""
        return gradient_norm(self.whole, self.parts, partial(sum_over_processes, trainer), device)

    def refuse_clipping_by_value(self) -> None:
        """Refuse to clip gradients by value that are no dense tensors.

        Raises:
            ConfigurationError: Names the setting.
        """
        if self.parts or any(param.grad is not None and param.grad.is_sparse for param in self.whole):
            raise ConfigurationError(
                "trainer.gradient_clip_algorithm: user tables and sharded policies can be clipped by 'norm' only."
            )


def gradient_norm(
    params: Iterable[nn.Parameter],
    sharded: Iterable[nn.Parameter] = (),
    add_up: Callable[[Tensor], Tensor] = lambda part: part,
    device: torch.device | None = None,
) -> Tensor:
    """Return the joint norm `[]` of all gradients, sparse ones included, which are coalesced.

    Args:
        params: Parameters that this process has all of, with gradients that are the same everywhere.
        sharded: Parameters that this process has a part of.
        add_up: Returns the sum of a number over the processes that have the parts.
        device: Where numbers are that travel between processes; gradients may be kept on the host.
    """
    parts = _gradients(sharded)
    norm: Tensor = nn.utils.get_total_norm(_gradients(params)).to(device)
    if not parts:
        return norm
    of_parts = add_up(nn.utils.get_total_norm(parts).to(device).square()).sqrt()
    joint: Tensor = torch.stack([norm, of_parts]).norm()
    return joint


def clip_gradients(params: Iterable[nn.Parameter], max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients, sparse ones included, so that their joint norm is at most `max_norm`; return the norm.

    Args:
        params: Parameters with gradients, of which this process may have parts only.
        max_norm: The limit.
        norm: `[]` the norm as it is, if `gradient_norm` has computed it already.
    """
    grads = _gradients(params)
    norm = nn.utils.get_total_norm(grads) if norm is None else norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device))
    return norm


def _gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this process's gradients as dense tensors that share their memory."""
    grads = []
    for param in params:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            param.grad = param.grad.coalesce()
            grads.append(param.grad.values())
        else:
            grads.append(param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad)
    return grads
