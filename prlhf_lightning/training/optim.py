"""The optimizer: AdamW for dense weights and for user tables, in which absent users do not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.distributed import sum_over_processes
from prlhf_lightning.training.sharding import is_sharded
from prlhf_lightning.user_models import UserModel

_Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
_HALF = (torch.bfloat16, torch.float16)
_OF_MASTER = ("master", "exp_avg", "exp_avg_sq")  # float32 state of a half-precision weight
_WARMUPS = "a whole number of steps, or, below 1, a share of all steps"
#: Default rate of adapters at this width, and the maximum at any width.
_RATE, _WIDTH, _HIGHEST = 1.5e-4, 2000, 2e-3
#: Rate of the directions of users' codes, relative to their root mean square. At 20 times the rate of adapters, which
#: suits prompts, a basis grew 17-fold in 300 steps, by noise.
_OF_DIRECTIONS = 0.01


@dataclass(frozen=True)
class Optim:
    """Learning rates and their schedule.

    Attributes:
        lr: Peak learning rate of the policy (adapters, or all weights). The default depends on the width d of the
                    policy: for adapters 1.5e-4 * (2000 / d)^0.775, at most 2e-3, which is 9e-5 for 7B parameters and
                    4e-4 for 135M; for all weights a tenth of it.
        user_lr: Peak learning rate of the user model. By default 20 times the default of adapters for soft prompts, and
                    twice that for a user model that reads users' pairs, whose parameters are matrices.
        table_lr: Peak learning rate of tables with one row per user (offsets, weights over clusters); null for
                    `user_lr`.
        weight_decay: Decoupled weight decay of the policy.
        user_weight_decay: Decoupled weight decay of user tables: pulls each user toward the generic user. It acts
            on a user's row only when the user is in the batch.
        betas: AdamW's moment decays.
        schedule: Shape of the schedule after the warm-up.
        warmup_steps: Steps of linear warm-up; below 1, a share of all steps.
    """

    lr: float | None = None
    user_lr: float | None = None
    table_lr: float | None = None
    weight_decay: float = 0.0
    user_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: _Schedule = "cosine"
    warmup_steps: float = 0.03

    def __post_init__(self) -> None:
        """Validate the settings."""
        for name in ("lr", "user_lr", "table_lr"):
            rate = getattr(self, name)
            # From 1e38 on, torch itself fails in the step.
            self._check(name, rate is None or 0 < rate <= 1e6, "a number above 0, at most 1e6, or null")
        for name in ("weight_decay", "user_weight_decay"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 (none) or more")
        allowed = "two numbers, each at least 0 and below 1"
        self._check("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), allowed)
        self._check("schedule", self.schedule in get_args(_Schedule), f"one of {', '.join(get_args(_Schedule))}")
        is_share_or_count = 0 <= self.warmup_steps < 1 or float(self.warmup_steps).is_integer()
        self._check("warmup_steps", self.warmup_steps >= 0 and is_share_or_count, _WARMUPS)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigurationError(f"model.optim.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    def for_width(self, width: int, all_weights: bool = False, reads_pairs: bool = False) -> Optim:
        """Return these settings with default rates filled in.

        The rule for the width is from "LoRA Without Regret" (Schulman et al., 2025) for Llama models, with a smaller
        constant than in supervised training, since preference losses need lower rates.

        Args:
            width: Width of the policy's embeddings.
            all_weights: Whether all weights of the policy are trained, not adapters.
            reads_pairs: Whether the user model reads users' pairs.
        """
        of_adapters = min(_RATE * (_WIDTH / width) ** 0.775, _HIGHEST)
        lr = self.lr if self.lr is not None else of_adapters / 10 if all_weights else of_adapters
        user_lr = self.user_lr if self.user_lr is not None else of_adapters * (2 if reads_pairs else 20)
        return replace(self, lr=lr, user_lr=user_lr)

    def group(self, name: str) -> dict[str, Any]:
        """Return the settings of a parameter group; all rates must be set.

        Args:
            name: `policy`, `user_model`, `user_tables`, or `user_directions`, whose rate is relative to their size.
        """
        rates = {
            "policy": self.lr,
            "user_model": self.user_lr,
            "user_tables": self.table_lr or self.user_lr,
            "user_directions": _OF_DIRECTIONS,
        }
        decays = {"policy": self.weight_decay, "user_tables": self.user_weight_decay}
        return {"lr": rates[name], "weight_decay": decays.get(name, 0.0), "betas": self.betas}

    def warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps of a run of `total_steps`."""
        return math.ceil(self.warmup_steps * total_steps) if self.warmup_steps < 1 else int(self.warmup_steps)


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW in which a sparse gradient updates only its own rows.

    Dense AdamW updates every row at each step, by momentum and weight decay, even if its user is not in the batch, and
    takes time in proportion to the number of users. Here a row with a gradient gets the AdamW update as if the steps
    without it did not exist (bias correction counts a row's own steps). Other rows do not change. `torch.optim.AdamW`
    handles dense gradients.

    A dense half-precision weight has a float32 *master* copy, which is updated; the weight is the rounded master.
    Without it, a step below 1/256 of a bfloat16 weight would be lost. The averages of its gradients are float32 too.
    Checkpoints store masters with the optimizer state.

    Attributes:
        is_stepping: True while weights change. It stays True if a step raises an exception, since the weights are then
                    neither those before the step nor those after it.
    """

    is_stepping = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.is_stepping = True
        done: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    self._step_rows(param, param.grad.coalesce(), group)
                elif param.dtype in _HALF:
                    self._step_master(param, group)
                else:
                    continue
                done.append((param, param.grad))
                param.grad = None  # AdamW refuses sparse gradients; they are already applied
        super().step()
        for param, grad in done:
            param.grad = grad
        self.is_stepping = False
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; see `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype. In bfloat16, a step count would stop at 256 and a master would
        # lose its extra bits.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(number, {})
                for name in _OF_MASTER if "master" in state else ("row_steps",):
                    if name in state:
                        self.state[param][name] = state[name].to(param.device, torch.float32, copy=True)

    @torch.no_grad()
    def _step_master(self, param: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "master" not in state:  # first step, or a checkpoint of a version without masters
            state["master"] = param.detach().float()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].float() if name in state else torch.zeros_like(state["master"])
            state.setdefault("step", torch.zeros(()))
        beta1, beta2 = group["betas"]
        # One by one, so that only one gradient at a time is in float32.
        adamw(
            [state["master"]],
            [param.grad.float()],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        param.copy_(state["master"])

    @torch.no_grad()
    def _step_rows(self, param: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())  # torch's AdamW expects it when it restores a state
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            state["row_steps"] = torch.zeros(len(param), dtype=torch.float32, device=param.device)
        state["step"] += 1
        rows, values = grad.indices()[0], grad.values()
        beta1, beta2 = group["betas"]
        steps = state["row_steps"][rows] + 1
        first = torch.lerp(values, state["exp_avg"][rows], beta1)
        second = torch.lerp(values.square(), state["exp_avg_sq"][rows], beta2)
        state["row_steps"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = steps, first, second

        shape = (-1,) + (1,) * (values.dim() - 1)
        correction1, correction2 = (1 - beta1**steps).view(shape), (1 - beta2**steps).view(shape)
        update = (first / correction1) / ((second / correction2).sqrt() + group["eps"])
        decayed = param[rows] * (1 - group["lr"] * group["weight_decay"])
        param[rows] = (decayed - group["lr"] * update).to(param.dtype)  # corrections are float32 for any table dtype


def make_optimizer(optim: Optim, policy: nn.Module, user_model: UserModel) -> RowwiseAdamW:
    """Return an optimizer with separate rates for the policy, the user model and its tables.

    Args:
        optim: The settings.
        policy: A policy that has been built.
        user_model: A user model that has been built.
    """
    tables = user_model.row_tables()
    directions = user_model.directions()
    apart = {id(param) for param in (*tables, *directions)}
    shared = [p for p in user_model.parameters() if p.requires_grad and id(p) not in apart]
    trained = [p for p in policy.parameters() if p.requires_grad]
    parts = {"policy": trained, "user_model": shared, "user_tables": tables, "user_directions": directions}
    return RowwiseAdamW(
        [{"name": name, "params": params, **optim.group(name)} for name, params in parts.items() if params]
    )


def make_schedule(optim: Optim, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Return the schedule of all rates over `steps` optimizer steps."""
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    schedule: LambdaLR = get_scheduler(name, optimizer, optim.warmup(steps), steps)
    return schedule


def apply_settings(optim: Optim, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    """Apply the settings of a run to a new optimizer and schedule, or to those restored from a checkpoint.

    Args:
        optim: The settings.
        optimizer: Its groups have the names of `Optim.group`.
        scheduler: Its scheduler; its step does not change.
    """
    for number, group in enumerate(optimizer.param_groups):
        settings = optim.group(group["name"])
        if group["name"] == "user_directions":  # relative to their size at the first step
            size = torch.cat([param.detach().flatten() for param in group["params"]]).square().mean().sqrt()
            settings["lr"] = scheduler.base_lrs[number] if scheduler.last_epoch else settings["lr"] * float(size)
        rate = settings["lr"] * scheduler.lr_lambdas[number](scheduler.last_epoch)
        group.update(settings, lr=rate, initial_lr=settings["lr"])
        scheduler.base_lrs[number] = settings["lr"]


def training_batches(trainer: Trainer) -> int:
    """Return the number of training batches per process and epoch, from the data module."""
    batches: int = trainer.datamodule.batches_per_epoch(trainer.world_size)  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def optimizer_steps(trainer: Trainer, per_batch: int = 1) -> int:
    """Return the number of optimizer steps of a fit.

    Counted from the data module: `trainer.estimated_stepping_batches` creates a loader as a side effect, and drops the
    loader's state on resume (Lightning issue 20550).

    Args:
        trainer: The trainer.
        per_batch: Optimizer steps that a batch takes, if batches are not accumulated.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be at least 1 (no "
            "accumulation)."
        )
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return int(trainer.estimated_stepping_batches)
    batches = training_batches(trainer)
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * per_batch * trainer.max_epochs)
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if not limits:
        raise ConfigurationError("trainer: set max_epochs or max_steps; the learning-rate schedule needs an end.")
    return max(1, min(limits))


@dataclass(frozen=True)
class StepParameters:
    """The parameters that a step updates.

    Attributes:
        whole: Parameters that this process holds completely, with equal gradients in all processes.
        parts: Parameters of a sharded policy, of which this process holds a shard.
    """

    whole: list[nn.Parameter]
    parts: list[nn.Parameter]

    @classmethod
    def of(cls, optimizer: Optimizer, policy: Policy) -> Self:
        """Return the parameters of an optimizer that trains a policy, sharded or not, and a user model."""
        parts = list(policy.parameters()) if is_sharded(policy) else []
        ids = {id(param) for param in parts}
        return cls([p for group in optimizer.param_groups for p in group["params"] if id(p) not in ids], parts)

    @property
    def all(self) -> list[nn.Parameter]:
        """All parameters."""
        return [*self.whole, *self.parts]

    def norm(self, trainer: Trainer, device: torch.device) -> Tensor:
        """Return the joint norm `[]` of their gradients; all processes must call this."""
        return gradient_norm(self.whole, self.parts, partial(sum_over_processes, trainer), device)

    def refuse_clipping_by_value(self) -> None:
        """Refuse clipping by value for gradients that are not dense tensors.

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
    """Return the joint norm `[]` of all gradients; sparse ones are coalesced.

    Args:
        params: Parameters that this process holds completely, with equal gradients in all processes.
        sharded: Parameters of which this process holds a shard.
        add_up: Returns the sum of a number over the processes with the shards.
        device: Device for communication between processes; gradients may be on the host.
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
        params: Parameters with gradients, of which this process may hold shards only.
        max_norm: The limit.
        norm: `[]` the current norm, if `gradient_norm` has computed it already.
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
