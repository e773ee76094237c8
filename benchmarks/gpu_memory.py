"""How much memory a training step needs, counted on tensors without content: no GPU and no weights needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from contenders import MODELS, RANK
from transformers import LlamaConfig, LlamaForCausalLM

_GIB = 2**30
_TOKENS = 128  # positions that layers are tried on


@dataclass(frozen=True)
class Counted:
    """Bytes of a model in bfloat16 and of what its layers keep for the backward pass.

    Attributes:
        weights: All weights.
        adapters: Adapters of all linear layers but the head, in float32, with gradient and both of AdamW's averages.
        position: What one layer keeps for each position.
        width: A hidden state.
        layers: Number of layers.
    """

    weights: int
    adapters: int
    position: float
    width: int
    layers: int

    def step(self, positions: int, checkpointing: bool) -> float:
        """Return the GiB of a step over so many positions of all rows, weights included."""
        kept = self.width * self.layers + self.position if checkpointing else self.position * self.layers
        return (self.weights + self.adapters + positions * kept) / _GIB


def count(model: str) -> Counted:
    """Count a model of `contenders.py`."""
    sizes = dict(MODELS[model])
    config = LlamaConfig(**sizes | {"num_attention_heads": sizes.pop("heads")}, tie_word_embeddings=False)
    with torch.device("meta"):
        lm = LlamaForCausalLM(config).to(torch.bfloat16)
        inputs = torch.zeros(1, _TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        places = torch.arange(_TOKENS)[None]
    lm.requires_grad_(False)
    linear = [module for module in lm.model.modules() if isinstance(module, torch.nn.Linear)]
    for module in linear:
        module.requires_grad_(True)  # keeps its input, as an adapter does
    adapters = 16 * sum(RANK * (module.in_features + module.out_features) for module in linear)
    kept: dict[int, torch.Tensor] = {}
    weights = {id(weight) for weight in lm.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    turned = lm.model.rotary_emb(inputs, places)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.model.layers[0](inputs, position_ids=places, position_embeddings=turned)
    # The attention of tensors without content keeps its square, which no kernel of a GPU does.
    linear_in_length = [part for part in kept.values() if part.shape[-2:] != (_TOKENS, _TOKENS)]
    size = sum(weight.numel() * weight.element_size() for weight in lm.parameters())
    position = sum(part.numel() * part.element_size() for part in linear_in_length) / _TOKENS
    return Counted(size, adapters, position, 2 * config.hidden_size, config.num_hidden_layers)
