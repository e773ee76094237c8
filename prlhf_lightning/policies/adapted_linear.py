"""A linear layer and its low-rank adapter as one operation."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # in float16 an adapter's gradients may vanish


class AdaptedLinear(lora.Linear):  # type: ignore[misc]
    """peft's layer `y = W x + b + s B A x` (Hu et al. 2021, section 4.1), whose adapter is added in place.

    peft computes `B A x`, its product with s, and the sum one after the other, each as large as y, forward and
    backward, and in float32 where the adapter is kept so. Here products with A and B add to what is there already,
    in the data type of W. What this does not cover (several adapters, dropout, a trained W) is left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `[..., in]`; return `[..., out]`."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        plain = not (args or kwargs) and dtype in _DTYPES and self._is_plain()
        if not plain or not (autocast or dtype == self.base_layer.weight.dtype):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        (name,) = self.active_adapters
        matrices = (base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        # As rows here and not within, since models may change in place what they get, and no view of a function's.
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            *(None if part is None else part.to(dtype) for part in (x.reshape(-1, x.shape[-1]), *matrices)),
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        """Tell whether there is one adapter and nothing about it but its two matrices."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        (name,) = names
        # FSDP1 may wrap each, whose weights are then there only while it is called.
        if any(type(part) is not nn.Linear for part in (self.base_layer, self.lora_A[name], self.lora_B[name])):
            return False
        dropout = self.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        return not drops and name not in self.lora_variant and not self.base_layer.weight.requires_grad


def use_adapted_linears(model: PeftModel) -> None:
    """Let the layers of a model that peft has adapted compute as `AdaptedLinear`, where they are plain ones."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = AdaptedLinear


class _Product(torch.autograd.Function):
    """`W x + b + s B A x` for rows of x `[N, in]`, of a frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return nn.functional.linear(x, weight, bias).addmm_(low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.T @ x, (grad.T @ low).mul_(ctx.scale), None
