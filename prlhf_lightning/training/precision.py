"""Half precision (`bf16-true`, `16-true`) with trained parameters in float32.

A bfloat16 weight has 8 significant bits: a step below 1/256 of its size, as most are, would be rounded away. So frozen
weights are in half precision, and adapters and the user model in float32, exactly as with `precision: 32-true` and
`policy.dtype: bfloat16`. If all weights are trained, they are in half precision, and the optimizer keeps a float32 copy
(see `RowwiseAdamW`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import MixedPrecision as ShardedDtypes

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy

_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class BFloat16WithFloat32Trained(Precision):
    """`bf16-true`: the module casts its frozen weights; nothing else is cast, and the default dtype does not change."""

    precision = "bf16-true"


class Float16WithFloat32Trained(MixedPrecision):
    """`16-true`: as above, with a gradient scaler, without which small float16 gradients would vanish.

    Args:
        device: Type of the device that computes, such as `cuda`.
    """

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device)
        self.precision = "16-true"

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Return a context without autocast: weights are float16 themselves."""
        yield


class ShardedWithFloat32Trained(FSDPPrecision):
    """`bf16-true` for FSDP1: each unit is gathered in its own dtype."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return the module unchanged: it has cast itself."""
        return module

    @property
    def mixed_precision_config(self) -> ShardedDtypes:
        """Return no dtypes other than those of the units."""
        return ShardedDtypes()

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context that keeps the default dtype."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context that keeps the default dtype."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context that keeps the default dtype."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Return batches unchanged: the reference's log-probs are float32."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Return outputs unchanged."""
        return data


def keep_trained_in_float32(trainer: Trainer) -> None:
    """Replace the precision plugin of a trainer with `bf16-true` or `16-true`, so that `cast_frozen` does the casting.

    Raises:
        ConfigurationError: The strategy does not support it.
    """
    strategy = trainer.strategy
    plugin = strategy.precision_plugin
    if type(plugin) is HalfPrecision:
        device = strategy.root_device.type
        in_bfloat16 = plugin.precision == "bf16-true"
        strategy.precision_plugin = BFloat16WithFloat32Trained() if in_bfloat16 else Float16WithFloat32Trained(device)
    elif type(plugin) is FSDPPrecision and plugin.precision in _DTYPES:
        if plugin.precision == "16-true":
            raise ConfigurationError(
                "trainer.precision is 16-true, and FSDP1Strategy does not scale gradients, so small ones vanish; "
                "use bf16-true, or prlhf_lightning.FSDP2Strategy."
            )
        strategy.precision_plugin = ShardedWithFloat32Trained("bf16-true")


def cast_frozen(policy: Policy, trainer: Trainer | None) -> None:
    """Cast a policy's weights, except adapters, to the half precision of a trainer, if it has one.

    Buffers do not change, such as the frequencies of rotary positions, which bfloat16 would distort.

    Args:
        policy: A policy that has been built, and not sharded.
        trainer: Its trainer, if any.
    """
    dtype = _DTYPES.get(str(trainer.precision)) if trainer is not None else None
    if dtype is None:
        return
    in_full = getattr(policy, "lora", policy) is None
    for param in policy.parameters():
        if param.is_floating_point() and (in_full or not param.requires_grad):
            param.data = param.data.to(dtype)


def check_float16(policy: Policy, trainer: Trainer) -> None:
    """Refuse to train float16 weights themselves, and warn if float16 gradients are not scaled.

    Args:
        policy: A policy that has been built.
        trainer: Its trainer.

    Raises:
        ConfigurationError: Names the settings.
    """
    params = [param for param in policy.parameters() if param.dtype == torch.float16]
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if any(param.requires_grad for param in params):
        raise ConfigurationError(
            "policy.lora is null, so all weights are trained, and they are float16, whose gradients vanish or "
            "overflow. Train in bfloat16 (trainer.precision: bf16-true, or model.policy.dtype: bfloat16), or keep the "
            "weights in float32 (model.policy.dtype: float32 with trainer.precision: 16-mixed)."
        )
    if params and not scaled:
        rank_zero_warn(
            "The weights are in float16, in which small gradients vanish, and trainer.precision "
            f"{trainer.precision} does not scale them. Set trainer.precision: 16-true, or use bfloat16."
        )


def described(trainer: Trainer) -> str:
    """Return a description of a trainer's precision, on which the last bits of log-probs depend."""
    plugin = cast(Any, trainer.precision_plugin)
    ours = isinstance(plugin, BFloat16WithFloat32Trained | Float16WithFloat32Trained | ShardedWithFloat32Trained)
    return f"{trainer.precision}, trained in float32" if ours else str(trainer.precision)
