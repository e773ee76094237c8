"""Load-balancing loss of mixtures of experts, which keeps routers from sending all tokens to a few experts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prlhf_lightning.errors import ConfigurationError


def router_loss_coef(lm: PreTrainedModel, wanted: float | None) -> float:
    """Return the weight of a model's load-balancing loss in training; 0 for no loss.

    Args:
        lm: The model.
        wanted: The user's setting; None uses the model's configuration, as transformers does: the loss is added if it
            sets `output_router_logits: true`.

    Raises:
        ConfigurationError: The model has no load-balancing loss, and `wanted` asks for it.
    """
    if not _has_router_loss(lm):
        if wanted:
            raise ConfigurationError(
                f"policy.router_aux_loss_coef is {wanted}, but {type(lm).__name__} has no load-balancing loss (it is "
                "not a mixture of experts, or does not return router logits); set it to null."
            )
        return 0.0
    config = lm.config.get_text_config()
    own = float(getattr(config, "router_aux_loss_coef", 0.0)) if config.output_router_logits else 0.0
    return own if wanted is None else wanted


def note_on_router_loss(lm: PreTrainedModel, wanted: float | None) -> str | None:
    """Return a note if a mixture of experts trains without its load-balancing loss and no weight is set."""
    if wanted is not None or not _has_router_loss(lm) or router_loss_coef(lm, None):
        return None
    usual = getattr(lm.config.get_text_config(), "router_aux_loss_coef", None) or 0.001
    return (
        f"{type(lm).__name__} is a mixture of experts, and its config.json does not enable its load-balancing loss "
        f"(output_router_logits). It trains without this loss; model.policy.router_aux_loss_coef={usual} adds it, and "
        "0 turns this message off."
    )


def states_and_router_loss(lm: PreTrainedModel, inputs: dict[str, Any], head: bool) -> tuple[Tensor, Tensor]:
    """Return a model's last hidden states `[B, L, d]` and its load-balancing loss `[]` over the unpadded positions.

    Args:
        lm: A mixture of experts.
        inputs: Its inputs, with the attention mask.
        head: Whether logits are just the output embedding applied to the hidden states. If not, logits `[B, L, V]` are
            returned instead of hidden states.
    """
    if not head:
        output = lm(**inputs, output_router_logits=True)
        return output.logits, output.aux_loss
    states: list[Tensor] = []
    handle = lm.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
    try:  # only the whole model computes the loss; skip the logits of all positions but one
        output = lm(**inputs, output_router_logits=True, logits_to_keep=1)
    finally:
        handle.remove()
    return states[0], output.aux_loss


@torch.no_grad()
def _has_router_loss(lm: PreTrainedModel) -> bool:
    has_setting = hasattr(lm.config.get_text_config(), "output_router_logits")
    if not has_setting or "output_router_logits" not in inspect.signature(lm.forward).parameters:
        return False
    try:
        tried = lm(torch.zeros(1, 2, dtype=torch.long, device=lm.device), use_cache=False, output_router_logits=True)
    except Exception:  # a Jamba without expert layers has no routers and fails
        return False
    return isinstance(getattr(tried, "aux_loss", None), Tensor)
