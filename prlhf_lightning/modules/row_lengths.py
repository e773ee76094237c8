"""Whether the rows of the data fit into the policy's positions, with the users' vectors in front of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import UserModel


@torch.no_grad()
def check_row_lengths(trainer: Trainer | None, policy: Policy, user_model: UserModel) -> None:
    """Refuse data with rows too long for the policy now, and not in the batch that has the longest one.

    Args:
        trainer: Its data module is asked for the longest row, if it has one that can tell; None where there is no
            trainer yet.
        policy: A policy that has been built.
        user_model: A user model that has been built.

    Raises:
        ConfigurationError: Names the lengths, and the settings that they follow from.
    """
    limit = policy.max_positions
    data: Any = getattr(trainer, "datamodule", None)
    if trainer is None or limit is None or not hasattr(data, "longest_row") or trainer.predicting:
        return
    if data.has_user_text and not user_model.uses_text:
        return  # it counts texts that this model leaves out
    # Not the module's device: after a fit Lightning leaves the model on the host, and says where it is to go next.
    device = next((param.device for param in user_model.parameters()), None)
    anyone = Users(torch.zeros(1, dtype=torch.long, device=device))
    vectors = user_model.generic(anyone).vectors.shape[1]
    if data.longest_row + vectors > limit:
        subject = "A streamed row may have" if getattr(data, "streaming", False) else "The longest row has"
        raise ConfigurationError(
            f"{subject} {data.longest_row} tokens (user text, prompt and completion), with the user's "
            f"{vectors} vectors {data.longest_row + vectors}; the policy has {limit} positions. Lower "
            "data.max_prompt_length, data.max_completion_length or data.max_user_text_length, or the user model's "
            "num_tokens."
        )
