"""Sharded training: each process holds a shard of the policy (FSDP2) and the whole user model.

Shards are gathered layer by layer, only while a method of the policy runs. So all processes must call the same methods
equally often, whatever their rows. A process without rows uses a `dummy_batch`.

Checkpoints are those of one process: a single file of trained weights, as full tensors under the same names. Any number
of processes can resume from them, sharded or not.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.types import PreferenceBatch, Tokens
from prlhf_lightning.utils import lightning_compat

#: Methods of a policy that callers use and that need its weights.
METHODS = ("log_probs", "reference_log_probs", "embed", "token_embeddings", "generate")


class OneFile(Strategy):
    """Mixin that makes a sharding strategy write checkpoints of one process; put it first."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Load weights before optimizers are created, as in one process: a checkpoint sets the users."""
        return False

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each process's shard of the optimizer state, on the device of its parameters.

        Lightning would move offloaded state from host memory to the GPU.
        """
        for optimizer, state in zip(self.optimizers, self._parts_of_state(checkpoint), strict=True):
            optimizer.load_state_dict(state)

    @abstractmethod
    def _parts_of_state(self, checkpoint: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Return this process's shard of each full optimizer state in a checkpoint."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let `load_optimizer_state_dict` restore the optimizer state."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a single file from the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a single file on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


class FSDP2Strategy(OneFile, ModelParallelStrategy):
    """Shards the policy over all processes with torch's `fully_shard` (FSDP2).

    It is Lightning's `ModelParallelStrategy` without tensor parallelism, and with the checkpoints of one process.

    Args:
        cpu_offload: Keep shards, gradients and optimizer state in host memory: less GPU memory, slower steps.
        reshard_after_forward: Free a layer's other shards after its forward pass, and gather them again for the
                    backward pass. Without it, a step communicates a third less, and needs the memory of the whole
                    policy.
        process_group_backend: `nccl`, `gloo`, ...; the default depends on the device.
        timeout: Time after which a process stops waiting for the others.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        """Set up the process group; each process has different data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Create the optimizers; see `Strategy.setup`."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # parameters gathered in inference mode cannot be trained later
        self._reshard()
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move unsharded modules to the device; shards are there already."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, param in module.named_parameters(recurse=False):
                if not isinstance(param, DTensor):
                    getattr(module, name).data = param.data.to(self.root_device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))
        lightning_compat.set_device(self.model, self.root_device)  # device of batches and metrics

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full trained weights on the first process, and nothing on the others."""
        assert isinstance(self.lightning_module, LightningModule)
        frozen = {name for name, param in self.lightning_module.named_parameters() if not param.requires_grad}
        weights = self.lightning_module.state_dict()
        # Checkpoints hold no frozen weights; gathering them would cost the time and memory of the whole backbone.
        return self._whole({name: weight for name, weight in weights.items() if name not in frozen})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state of an optimizer on the first process, and nothing on the others."""
        content = getattr(optimizer, "optimizer", optimizer).state_dict()
        state = {number: self._whole(values) for number, values in content["state"].items()}
        return {"state": state, "param_groups": content["param_groups"]} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load each process's shard of the weights."""
        assert self.lightning_module is not None
        self._reshard()
        params = dict(self.lightning_module.named_parameters())
        parts = {name: _part(weight, params.get(name)) for name, weight in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def _parts_of_state(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # torch also identifies parameters by their positions in the groups.
            params = [param for group in optimizer.param_groups for param in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            param_of = dict(zip(numbers, params, strict=True))
            state = {
                number: {key: _part(value, param_of[number]) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            states.append({**saved, "state": state})
        return states

    def _reshard(self) -> None:
        """Free gathered weights of an earlier run."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        # One by one, so that a process holds at most one full tensor besides its shards.
        whole = {}
        for name, tensor in tensors.items():
            full = _whole(tensor)
            if self.is_global_zero:
                whole[name] = full.cpu() if isinstance(full, Tensor) else full
        return whole


def _whole(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    here: DTensor = value.detach().to(value.device_mesh.device_type)  # type: ignore[assignment]
    return here.full_tensor()  # tensors on the host cannot be communicated


def _part(value: Any, param: Tensor | None) -> Any:
    """Return this process's shard of a full tensor, if the tensor belongs to a sharded parameter."""
    if not isinstance(param, DTensor) or not isinstance(value, Tensor) or value.dim() != param.dim():
        return value
    part = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return part.to(param.device)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy that would shard nothing, or that cannot save a model with its users.

    Raises:
        ConfigurationError: Names the strategy to use.
    """
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ConfigurationError(
            "trainer.strategy is ModelParallelStrategy, which with data_parallel_size and tensor_parallel_size 'auto' "
            "gives all processes of a node the same data. Use class_path: prlhf_lightning.FSDP2Strategy, which is "
            "ModelParallelStrategy with data_parallel_size set to the number of processes and tensor_parallel_size to "
            "1, and with checkpoints that are single files of what was trained."
        )
    if type(strategy) is FSDPStrategy:
        raise ConfigurationError(
            "trainer.strategy is FSDPStrategy, which would also shard the user tables, and cannot sum "
            "their sparse gradients. Use class_path: prlhf_lightning.FSDP1Strategy, which takes the same arguments and "
            "shards only the policy, or prlhf_lightning.FSDP2Strategy."
        )


def is_sharded(module: nn.Module) -> bool:
    """Return whether a policy is sharded over processes."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrappers of FSDP1."""
    return name.replace("_fsdp_wrapped_module.", "")


def shard(policy: Policy, strategy: Strategy | None) -> None:
    """Shard a policy if the strategy does so; do nothing otherwise.

    Layers are gathered one by one, and the rest (embeddings, LM head) for the duration of a method call.

    Args:
        policy: A policy that has been built, the same in every process.
        strategy: Strategy of its trainer, or None.
    """
    if not isinstance(strategy, FSDP2Strategy):
        return
    mesh = strategy.device_mesh["data_parallel"]
    pin = strategy.root_device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pin) if strategy.cpu_offload else OffloadPolicy()
    for unit in policy.prepare_for_sharding():
        _same_everywhere(unit, strategy)
        fully_shard(unit, mesh=mesh, reshard_after_forward=strategy.reshard_after_forward, offload_policy=offload)
    _same_everywhere(policy, strategy)
    # Not freed after a forward pass: several methods are called in turn, and not equally often in all processes (texts
    # of users are embedded only if a batch has any).
    fully_shard(policy, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
    # The returned tensors are never modified in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name in METHODS:
        register_fsdp_forward_method(policy, name)


@torch.no_grad()
def _same_everywhere(module: nn.Module, strategy: FSDP2Strategy) -> None:
    """Broadcast the first process's trainable weights; frozen ones were loaded from the same files."""
    for param in module.parameters():
        if param.requires_grad and not isinstance(param, DTensor):
            param.data = param.data.to(strategy.root_device)
            torch.distributed.broadcast(param.data, src=0)


def dummy_batch(batch: PreferenceBatch) -> PreferenceBatch:
    """Return a one-token dummy batch of the generic user, for a process with an empty batch but needed weights."""
    token = Tokens(batch.prompt.ids.new_zeros(1, 1), batch.prompt.mask.new_ones(1, 1))
    nothing = Tokens(token.ids[:, :0], token.mask[:, :0])
    return PreferenceBatch(("",), nothing, token, token, token, batch.records.new_zeros(1))
