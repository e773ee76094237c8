"""A pretended GPU, for machines that have none: within it tensors can be on `cuda`, where they are computed for real.

Their memory is the host's. What is kept of each is whether it is said to be on the GPU, and with that two things are
found out that no CPU shows: operations whose tensors are on different devices, which raise here as they do there, and
places where the host waits for the device. What CUDA allows is allowed: a number from the host (a tensor without
dimensions) in arithmetic, and indices from the host.

Random numbers drawn on the GPU are others than those of the host under the same seed, as they are there.

It knows nothing of streams, kernels, dtypes that a GPU lacks, or memory. What counts as a wait follows torch's sources;
it was not compared with `torch.cuda.set_sync_debug_mode`, and what libraries do on a GPU only is not seen.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import prlhf_lightning

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_PACKAGE = str(Path(prlhf_lightning.__file__).parent)
_MAKERS_BY_CHANCE = (torch.rand, torch.randn, torch.randint, torch.randperm)
_MAKERS = _device_constructors()
_aten = torch.ops.aten

#: Operations whose result has as many rows as their input's values say, or is a value: the host waits for them.
_WAITS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.unique_dim_consecutive,
    _aten.equal,
    _aten.is_nonzero,
    _aten._coalesce,
    _aten.bincount,
}
_WRITES_AT_INDICES = {_aten.index_put_, _aten.index_put, _aten._index_put_impl_}
#: Operations that take a number from the host beside what is on the device, though they are not pointwise.
_TAKES_NUMBERS = {_aten.copy_, _aten.fill_, _aten.masked_fill, *_WRITES_AT_INDICES}
_TAKES_HOST_INDICES = {_aten.index, _aten._unsafe_index, *_WRITES_AT_INDICES}
_DRAWS = {_aten.normal_, _aten.uniform_, _aten.bernoulli_, _aten.random_, _aten.rand_like, _aten.randn_like}


class OtherDeviceError(RuntimeError):
    """Tensors of one operation are on different devices."""


class PretendedGPU(TorchFunctionMode):
    """Within it, `cuda` can be named as a device.

    Attributes:
        waits: How often the host waited for the device, by the line of the package that had it wait and what for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.makes = False  # whether the program itself makes a tensor at the moment, and so says where
        self._operations = _Operations(self)
        self._surroundings = ExitStack()

    def __enter__(self) -> PretendedGPU:
        # transformers loads weights in threads, which know of no mode, and asks CUDA for memory before.
        self._surroundings.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        self._surroundings.enter_context(patch("torch.cuda.current_device", lambda: 0))
        self._surroundings.enter_context(patch("transformers.modeling_utils.caching_allocator_warmup"))
        self._surroundings.enter_context(self._operations)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._surroundings.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if func is Tensor.get_device:
            return 0 if is_on_gpu(args[0]) else -1
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, args, kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.tolist and is_on_gpu(args[0]):
            self.wait("a copy to the host")
        if func in (Tensor.numpy, Tensor.__array__) and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        device = kwargs.get("device")
        if func is Tensor.new_tensor and device is None and is_on_gpu(args[0]):
            device = GPU
        place = None if device is None else torch.device(device)
        self.makes, before = self.makes or func in _MAKERS, self.makes
        try:
            made = func(*args, **(kwargs | {"device": CPU} if place is not None and place.type == "cuda" else kwargs))
        finally:
            self.makes = before
        if place is None or place.type == "meta":
            return made
        if place.type == "cuda" and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and made.numel():
            self.wait("a copy from the host")
        for tensor in _tensors(made):
            _put(tensor, place.type == "cuda")
            if place.type == "cuda" and func in _MAKERS_BY_CHANCE:
                _draw_others(tensor)
        return made

    def wait(self, what: str) -> None:
        """Take note that the host waits for the device."""
        self.waits[f"{_caller()}: {what}"] += 1

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, name = func(*args, **kwargs), getattr(getattr(func, "__self__", None), "__name__", "")
        if name in ("device", "is_cuda", "is_cpu") and is_on_gpu(args[0]):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name]
        return value

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, where, dtype, waits = args[0], GPU if func is Tensor.cuda else CPU, None, not kwargs.get("non_blocking")
        is_here = is_on_gpu(tensor)
        if func is Tensor.to:
            like = next((one for one in (*args[1:], kwargs.get("other")) if isinstance(one, Tensor)), None)
            if like is None:
                rest = {name: value for name, value in kwargs.items() if name != "copy"}
                where, dtype, does_not_wait, _ = torch._C._nn._parse_to(*args[1:], **rest)
                waits = not does_not_wait
            else:
                where, dtype = GPU if is_on_gpu(like) else CPU, like.dtype
        if tensor.is_meta or (where is not None and where.type == "meta"):
            return func(*args, **kwargs)
        goes = is_here if where is None else where.type == "cuda"
        if dtype is not None or kwargs.get("copy"):
            tensor = func(tensor, dtype or tensor.dtype, copy=bool(kwargs.get("copy")))
        if goes == is_here:
            return tensor
        if waits and tensor.numel():
            self.wait("a copy from the host" if goes else "a copy to the host")
        return _Move.apply(tensor, goes) if tensor.is_floating_point() else _copied(tensor, goes)


class _Operations(TorchDispatchMode):
    """Looks at where the tensors of every operation are."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        given = _tensors((args, kwargs))
        there = [tensor for tensor in given if is_on_gpu(tensor)]
        if there:
            self._look_at_waits(op, args, kwargs, there)
            here = [tensor for tensor in given if not is_on_gpu(tensor) and not self._joins(tensor)]
            if here and not self._may_mix(func, op, args, here, there):
                raise OtherDeviceError(
                    f"Expected all tensors to be on the same device, but {func} got {_shapes(there)} on cuda and "
                    f"{_shapes(here)} on cpu."
                )
        before = [storage for tensor in given for storage in _storages(tensor)]  # an operation may replace them
        made = func(*args, **kwargs)
        if there and op in _DRAWS:
            _draw_others(made)
        # Made within torch, as in a backward pass, for what it will meet.
        is_open = all(getattr(storage, "is_open", False) for storage in before) and not self._gpu.makes
        inputs = {id(storage) for storage in before}
        for storage in (storage for tensor in _tensors(made) for storage in _storages(tensor)):
            if id(storage) not in inputs and there:
                storage.pretends = True
            elif id(storage) not in inputs and is_open:
                storage.is_open = True
        return made

    def _joins(self, tensor: Tensor) -> bool:
        """Put a tensor on the GPU that meets others there, if nobody has said where it is."""
        is_open = any(getattr(storage, "is_open", False) for storage in _storages(tensor))
        if is_open:
            _put(tensor, True)
        return is_open

    def _may_mix(self, func: Any, op: Any, args: Any, here: list[Tensor], there: list[Tensor]) -> bool:
        if op is _aten.copy_:
            self._gpu.wait("a copy from the host" if is_on_gpu(args[0]) else "a copy to the host")
            return True
        if op in _TAKES_HOST_INDICES and is_on_gpu(args[0]):
            indices = [index for index in args[1] if index is not None and not is_on_gpu(index)]
            for _ in indices:
                self._gpu.wait("indices from the host")
            ids = {id(index) for index in indices}
            here = [tensor for tensor in here if id(tensor) not in ids]
        if op._qualified_op_name.startswith("aten::_foreach"):
            lists = [[is_on_gpu(tensor) for tensor in part] for part in args if isinstance(part, list | tuple)]
            return all(len(set(column)) == 1 for column in zip(*(p for p in lists if p), strict=False))
        numbers = torch.Tag.pointwise in func.tags or op in _TAKES_NUMBERS
        # A result that is written into can't be on the host, be it a number.
        writes = func._schema.is_mutable and not is_on_gpu(args[0])
        return not here or (numbers and not writes and all(tensor.dim() == 0 for tensor in here))

    def _look_at_waits(self, op: Any, args: Any, kwargs: Any, there: list[Tensor]) -> None:
        if op in _WAITS or (op is _aten.repeat_interleave and kwargs.get("output_size") is None):
            self._gpu.wait(op._qualified_op_name.removeprefix("aten::"))
        elif op in _TAKES_HOST_INDICES:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._gpu.wait("nonzero of a mask")


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return _copied(tensor, to_gpu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _copied(grads[0], not ctx.to_gpu), None


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is said to be on the GPU."""
    storages = _storages(tensor)
    return bool(storages) and hasattr(storages[-1], "pretends")


def _put(tensor: Tensor, on_gpu: bool) -> None:
    for storage in _storages(tensor):
        storage.is_open = False
        if on_gpu:
            storage.pretends = True
        elif hasattr(storage, "pretends"):
            del storage.pretends


def _draw_others(tensor: Tensor) -> None:
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        tensor.copy_(tensor.flatten().flip(0).view_as(tensor))


def _copied(tensor: Tensor, on_gpu: bool) -> Tensor:
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        copy = tensor.detach().clone()
    _put(copy, on_gpu)
    return copy


def _storages(tensor: Tensor) -> list[Any]:
    """Return where a tensor's numbers are: the same objects for all of its views, for as long as there are any."""
    parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
    return [part.untyped_storage() for part in parts]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)


def _caller() -> str:
    """Return the line of the package that is being run, or else the one that called into a library."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class _PretendedAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        """Nothing to tear down."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"


def on_gpu() -> dict[str, Any]:
    """Return the arguments of a Trainer that trains on the pretended GPU."""
    return {"accelerator": "auto", "devices": 1, "strategy": SingleDeviceStrategy(GPU, _PretendedAccelerator())}
