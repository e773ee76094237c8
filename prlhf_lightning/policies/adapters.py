"""Low-rank adapters."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.adapted_linear import use_adapted_linears
from prlhf_lightning.policies.targets import adaptable


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
        """Refuse what no adapter can be made with."""
        if self.rank < 1:
            raise ConfigurationError(
                f"policy.lora.rank is {self.rank}; it must be 1 or more (set policy.lora to null to train all weights)."
            )
        if self.alpha <= 0:
            raise ConfigurationError(f"policy.lora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"policy.lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not self.target_modules:
            raise ConfigurationError("policy.lora.target_modules is empty; name layers to adapt, or use 'all-linear'.")


def add_adapters(lm: PreTrainedModel, lora: LoRA) -> PeftModel:
    """Put adapters into a model, whose own weights are frozen.

    Raises:
        ConfigurationError: The layers named are not there, or can't be adapted.
    """
    layers = {name: isinstance(module, nn.Linear | Conv1D) for name, module in lm.named_modules()}
    linear = sorted({name.rpartition(".")[2] for name, is_linear in layers.items() if is_linear})
    refused = (
        f"policy.lora.target_modules is {lora.target_modules!r}, which does not fit {type(lm).__name__}; its linear "
        f"layers are named {', '.join(linear)}."
    )
    targets = adaptable(lm, lora.target_modules)
    if isinstance(targets, str) and targets in linear:
        targets = [targets]  # which peft would take for a regular expression of full names
    names = [] if isinstance(targets, str) else targets
    # peft passes over a name that fits nothing, as long as another one does.
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
        # peft reads an attribute that transformers has renamed; nothing that a user could act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # peft looks for adapters of experts among those of layers, and says that it passed over what it used.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        try:
            model = get_peft_model(lm, config)
        except ValueError as error:  # layers that peft can't adapt
            raise ConfigurationError(refused + f" peft says: {error}") from error
    use_adapted_linears(model)
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge adapters into the weights of a model, which is changed, and return it without peft.

    An adapted layer that shares its weight with another one (an LM head with the embeddings) gets one of its own, since
    an adapter changes the one layer and not the other; the configuration then says that they are not tied.
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
