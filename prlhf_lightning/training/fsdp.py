"""Sharded training with torch's older `FullyShardedDataParallel` (FSDP1), as Lightning's `FSDPStrategy` has it.

It shards only the policy, after the weights are loaded, so checkpoints are those of one process, as with
`FSDP2Strategy`. FSDP1 flattens all weights of a unit into one tensor: they must have one dtype, and gradients take the
memory of all of them. So each adapter is a unit of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.optim import Optimizer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.sharding import METHODS, OneFile
from prlhf_lightning.utils import lightning_compat

_rekey = FullyShardedDataParallel.rekey_optim_state_dict


class FSDP1Strategy(OneFile, FSDPStrategy):
    """Shards the policy over all processes with torch's older FSDP; prefer `FSDP2Strategy`.

    It is Lightning's `FSDPStrategy`, with the same arguments and with the checkpoints of one process.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        policy: Any = model.policy
        for name, child in model.named_children():
            if name != "policy":
                child.to(self.root_device)
        if not isinstance(policy, FullyShardedDataParallel):
            model.policy = self._wrapped(policy)
        lightning_compat.set_device(model, self.root_device)  # device of batches and metrics
        return model

    def _wrapped(self, policy: Policy) -> FullyShardedDataParallel:
        names = {id(param): 0 for param in policy.parameters() if param.requires_grad}
        for _, param in policy.named_parameters(remove_duplicate=False):
            if id(param) in names:
                names[id(param)] += 1
        if any(count > 1 for count in names.values()):
            raise ConfigurationError(
                "trainer.strategy: FSDP1Strategy cannot train tied weights, such as embeddings that are also the "
                "LM head. Use prlhf_lightning.FSDP2Strategy, or policy.lora."
            )
        units = {id(unit) for unit in policy.prepare_for_sharding()}
        partly = any(not param.requires_grad for param in policy.parameters())

        def is_unit(module: nn.Module) -> bool:
            trained = any(param.requires_grad for param in module.parameters(recurse=False))
            is_adapter = partly and trained and not any(module.children())
            return id(module) in units or is_adapter

        options = {name: value for name, value in self.kwargs.items() if name != "auto_wrap_policy"}
        wrapper = FullyShardedDataParallel(
            policy,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=is_unit),
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision,  # autocast or the weights' own dtype, as with every other strategy
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **options,
        )
        # FSDP1 gathers weights only around `forward`, so every method call goes through it.
        policy.forward = _call
        for name in METHODS:
            setattr(policy, name, partial(wrapper, getattr(policy, name)))
        return wrapper

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full trained weights on the first process."""
        with self._whole():
            return self._module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state of an optimizer on the first process."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._whole():
            state = FullyShardedDataParallel.optim_state_dict(self._module, optimizer)
            if not self.is_global_zero:
                return {}
            return _rekey(state, OptimStateKeyType.PARAM_ID, self._module, optim=optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, which are not sharded yet."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def _parts_of_state(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        states = []
        with self._whole(rank0_only=False):
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                named = _rekey(saved, OptimStateKeyType.PARAM_NAME, self._module, optim=optimizer)
                states.append(FullyShardedDataParallel.optim_state_dict_to_load(self._module, optimizer, named))
        return states

    @property
    def _module(self) -> LightningModule:
        assert isinstance(self.lightning_module, LightningModule)
        return self.lightning_module

    def _whole(self, rank0_only: bool = True) -> AbstractContextManager[Any]:
        # Tensors that are already on the host would be "offloaded" as references to memory that is then freed.
        offload = self.root_device.type != "cpu"
        return FullyShardedDataParallel.state_dict_type(
            self._module,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
        )


def _call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
