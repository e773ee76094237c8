"""LoRA adapters: settings, insertion, merging, and a faster adapted layer."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prlhf_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021), made by peft.

    Attributes:
        rank: Rank r of each adapter.
        alpha: Scale; an adapter's update is multiplied by alpha / rank.
        dropout: Dropout on an adapter's input during training.
        target_modules: Names of the layers to adapt, a regular expression of their full names, or `all-linear` for
            every linear layer but the LM head.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        """Reject values out of range."""
        if self.rank < 1:
            raise ConfigurationError(
                f"policy.lora.rank is {self.rank}; it must be 1 or more (set policy.lora to null to train all weights)."
            )
        if self.alpha <= 0:
            raise ConfigurationError(f"policy.lora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"policy.lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not self.target_modules:
            raise ConfigurationError("policy.lora.target_modules is empty; list layers to adapt, or use 'all-linear'.")


def add_adapters(lm: PreTrainedModel, lora: LoRA) -> PeftModel:
    """Add adapters to a model and freeze its own weights.

    Raises:
        ConfigurationError: A named layer does not exist, or cannot be adapted.
    """
    layers = {name: isinstance(module, nn.Linear | Conv1D) for name, module in lm.named_modules()}
    linear = sorted({name.rpartition(".")[2] for name, is_linear in layers.items() if is_linear})
    refused = (
        f"policy.lora.target_modules is {lora.target_modules!r}, which does not fit {type(lm).__name__}; its linear "
        f"layers are named {', '.join(linear)}."
    )
    targets = adaptable(lm, lora.target_modules)
    if isinstance(targets, str) and targets in linear:
        targets = [targets]  # peft would treat a string as a regular expression of full names
    names = [] if isinstance(targets, str) else targets
    # peft ignores a name without a match, as long as another name matches.
    if unknown := [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise ConfigurationError(refused + f" Not found: {', '.join(unknown)}.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),  # GPT-2 keeps weights transposed
    )
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed; users cannot act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # False warning: peft looks for adapters of experts among those of layers, and reports keys that it did use.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        try:
            model = get_peft_model(lm, config)
        except ValueError as error:  # layers that peft cannot adapt
            raise ConfigurationError(refused + f" peft says: {error}") from error
    use_adapted_linears(model)
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge adapters into a model's weights in place, and return the model without peft.

    An adapter changes only its own layer. So an adapted layer with a tied weight (an LM head tied to the embeddings)
    first gets its own copy, and the configuration then says that the weights are not tied.
    """
    lm: PreTrainedModel = model.get_base_model()
    uses = Counter(id(weight) for module in lm.modules() for weight in module.parameters(recurse=False))
    for module in lm.modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if layer is not None and uses[id(getattr(layer, "weight", None))] > 1:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            lm.config.tie_word_embeddings = lm.config.get_text_config().tie_word_embeddings = False
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


_DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # in float16 an adapter's gradients may underflow


class AdaptedLinear(lora.Linear):  # type: ignore[misc]
    """peft's layer `y = W x + b + s B A x` (Hu et al. 2021, section 4.1), with the adapter added in place.

    peft computes `B A x`, its product with s, and the sum as separate tensors as large as y, forward and backward, in
    the adapter's float32. Here the products with A and B accumulate into the output, in the data type of W. Other cases
    (several adapters, dropout, a trained W) use peft's own forward.
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
        # Reshape outside the function: models may modify the output in place, and autograd forbids that for a view
        # that a custom function returns.
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            *(None if part is None else part.to(dtype) for part in (x.reshape(-1, x.shape[-1]), *matrices)),
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        """Return whether the layer has exactly one adapter, which is just its two matrices."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        (name,) = names
        # FSDP1 may wrap each of them; their weights then exist only during their own call.
        if any(type(part) is not nn.Linear for part in (self.base_layer, self.lora_A[name], self.lora_B[name])):
            return False
        dropout = self.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        return not drops and name not in self.lora_variant and not self.base_layer.weight.requires_grad


def use_adapted_linears(model: PeftModel) -> None:
    """Turn a model's adapted plain linear layers into `AdaptedLinear`."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = AdaptedLinear


class _Product(torch.autograd.Function):
    """`W x + b + s B A x` for rows of x `[N, in]`, with frozen W and b."""

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


_ALL = "all-linear"
#: Mamba's kernels read the weights of these layers without calling the layers, on a GPU and in part on a CPU.
_FUSED = ("out_proj", "x_proj", "dt_proj")


def adaptable(lm: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """Return the layers to adapt; full names if `all-linear` would include layers that cannot be adapted.

    An adapter has no effect if a model reads a layer's weight without calling the layer, as Mamba's mixers do. It
    breaks layers that return more than a product, such as Llama 4's routers.
    """
    if targets != _ALL:
        return targets
    linear = {name: module for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    excluded = {f"{mixer}.{name}" for mixer in _mamba_mixers(lm) for name in _FUSED} | _routers(lm, linear)
    if not excluded & linear.keys():
        return targets
    head = lm.get_output_embeddings()
    return [name for name, module in linear.items() if name not in excluded and module is not head]


def _mamba_mixers(lm: PreTrainedModel) -> set[str]:
    # Gated delta nets (Qwen3-Next) also have A_log, but no D, and do call their layers.
    return {name for name, module in lm.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}


@torch.no_grad()
def _routers(lm: PreTrainedModel, linear: dict[str, nn.Module]) -> set[str]:
    """Return the names of custom linear layers that do not return a tensor, found by trial on one token."""
    usual = (nn.Linear.forward, Conv1D.forward)
    own = {name: module for name, module in linear.items() if type(module).forward not in usual}
    if not own:
        return set()
    found: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *call, name=name: None if isinstance(call[-1], Tensor) else found.add(name))
        for name, module in own.items()
    ]
    try:
        lm(torch.zeros(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
