"""Which layers can be adapted: those that a model computes with by calling them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ALL = "all-linear"
#: Mamba's kernels take the weights of these layers and never call them, on a GPU; some do on a CPU.
_FUSED = ("out_proj", "x_proj", "dt_proj")


def adaptable(lm: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """Return the layers to adapt, by their full names where `all-linear` stands for some that can't be.

    An adapter is passed by where a model takes a layer's weight without calling it, as in Mamba's mixers, and breaks
    what returns more than a product, as Llama 4's routers do.
    """
    if targets != _ALL:
        return targets
    linear = {name: module for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    passed_by = {f"{mixer}.{name}" for mixer in _mamba_mixers(lm) for name in _FUSED} | _routers(lm, linear)
    if not passed_by & linear.keys():
        return targets
    head = lm.get_output_embeddings()
    return [name for name, module in linear.items() if name not in passed_by and module is not head]


def _mamba_mixers(lm: PreTrainedModel) -> set[str]:
    # Gated delta nets (Qwen3-Next) have an A_log too, but no D, and call their layers.
    return {name for name, module in lm.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}


@torch.no_grad()
def _routers(lm: PreTrainedModel, linear: dict[str, nn.Module]) -> set[str]:
    """Try on a token which layers of a model's own making return something else than a tensor."""
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
