"""Sharded training: each process holds a part of the policy (FSDP2), and all of the user model.

A policy's parts are put together only while a method of it runs, layer by layer. All processes must therefore run the
same methods as often, whatever their rows; that each has a batch to run them on is what `dummy_batch` is for.

Checkpoints are those of one process: a single file of what was trained, whole tensors under the same names and numbers.
They can be read everywhere, and training goes on from them on any number of processes, sharded or not.
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

#: What is called on a policy from outside, and needs its weights.
METHODS = ("log_probs", "reference_log_probs", "embed", "token_embeddings", "generate")


class OneFile(Strategy):
    """What a strategy that shards does for its checkpoints to be those of one process: a mixin, put first."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Say that weights are loaded before optimizers are made, as in one process: a checkpoint brings its users."""
        return False

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each process's part of the optimisers' state, and leave it beside its parameters.

        Lightning would move what is kept in the host's memory to the GPU.
        """
        for optimizer, state in zip(self.optimizers, self._parts_of_state(checkpoint), strict=True):
            optimizer.load_state_dict(state)

    @abstractmethod
    def _parts_of_state(self, checkpoint: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Return each optimiser's state as this process holds it, of the whole one in a checkpoint."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Say that the optimisers' state is loaded by `load_optimizer_state_dict`."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a single file, from the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a single file, whole, on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


class FSDP2Strategy(OneFile, ModelParallelStrategy):
    """Shards the policy over all processes with torch's `fully_shard` (FSDP2).

    It is Lightning's `ModelParallelStrategy` without tensor parallelism, and with the checkpoints of one process.

    Args:
        cpu_offload: Keep the shards, their gradients and the optimiser's state in the host's memory: less memory on the
            GPU, slower steps.
        reshard_after_forward: Let go of a layer's other parts after its forward pass, and gather them again for the
            backward pass. Without it a step communicates a third less, and takes the memory of the whole policy.
        process_group_backend: `nccl`, `gloo`, ...; by default what suits the device.
        timeout: How long a process waits for the others before it gives up.
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
        """Join the other processes, all of which hold different data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Make the optimizers; see `Strategy.setup`."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # parameters that are gathered in it could not be trained later
        self._reshard()
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move what is not sharded; the shards are where they belong."""
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
        lightning_compat.set_device(self.model, self.root_device)  # where batches and metrics go

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained weights, whole, on the first process, and nothing on the others."""
        assert isinstance(self.lightning_module, LightningModule)
        frozen = {name for name, param in self.lightning_module.named_parameters() if not param.requires_grad}
        weights = self.lightning_module.state_dict()
        # Frozen ones are in no checkpoint; gathering them would take the time and memory of the whole backbone.
        return self._whole({name: weight for name, weight in weights.items() if name not in frozen})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state, whole, on the first process, and nothing on the others."""
        content = getattr(optimizer, "optimizer", optimizer).state_dict()
        state = {number: self._whole(values) for number, values in content["state"].items()}
        return {"state": state, "param_groups": content["param_groups"]} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load each process's part of the weights."""
        assert self.lightning_module is not None
        self._reshard()
        params = dict(self.lightning_module.named_parameters())
        parts = {name: _part(weight, params.get(name)) for name, weight in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def _parts_of_state(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # torch, too, tells parameters by their places in the groups.
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
        """Have modules hold their shards, and not what an earlier run has left gathered."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        # One after the other, so that no process ever holds more than one of them beside its parts.
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
    return here.full_tensor()  # what is kept on the host could not travel


def _part(value: Any, param: Tensor | None) -> Any:
    """Return this process's part of a whole tensor, if that is a parameter's, or its state's, and it is sharded."""
    if not isinstance(param, DTensor) or not isinstance(value, Tensor) or value.dim() != param.dim():
        return value
    part = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return part.to(param.device)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which nothing would be sharded, or that cannot save a model with its users.

    Raises:
        ConfigurationError: Names the strategy to use in its place.
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
            "trainer.strategy is FSDPStrategy, which would divide the user tables with the policy, and cannot sum up "
            "their sparse gradients. Use class_path: prlhf_lightning.FSDP1Strategy, which takes the same arguments and "
            "divides the policy alone, or prlhf_lightning.FSDP2Strategy."
        )


def is_sharded(module: nn.Module) -> bool:
    """Say whether each process holds a part of a policy only."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def plain_name(name: str) -> str:
    """Return a parameter's name as it was before FSDP1 wrapped the modules that it is in."""
    return name.replace("_fsdp_wrapped_module.", "")


def shard(policy: Policy, strategy: Strategy | None) -> None:
    """Keep this process's part of a policy, where the strategy is one that shards; do nothing otherwise.

    Its layers are gathered one by one, and what is left (embeddings, LM head) for as long as a method of it runs.

    Args:
        policy: A policy that has been built, the same in every process.
        strategy: What trains it; None where nothing does.
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
    # Never let go of after a forward pass: methods are called one after the other, and not equally often everywhere
    # (texts of users are embedded where a batch has any).
    fully_shard(policy, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
    # What the methods return is never written into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name in METHODS:
        register_fsdp_forward_method(policy, name)


@torch.no_grad()
def _same_everywhere(module: nn.Module, strategy: FSDP2Strategy) -> None:
    """Give all processes the first one's trainable weights; frozen ones were loaded from the same files."""
    for param in module.parameters():
        if param.requires_grad and not isinstance(param, DTensor):
            param.data = param.data.to(strategy.root_device)
            torch.distributed.broadcast(param.data, src=0)


def dummy_batch(batch: PreferenceBatch) -> PreferenceBatch:
    """Return one pair of nobody's, of a token each, for a process whose batch is empty and whose weights are needed."""
    token = Tokens(batch.prompt.ids.new_zeros(1, 1), batch.prompt.mask.new_ones(1, 1))
    nothing = Tokens(token.ids[:, :0], token.mask[:, :0])
    return PreferenceBatch(("",), nothing, token, token, token, batch.records.new_zeros(1))
