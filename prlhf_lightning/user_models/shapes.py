"""Shapes of a user model's parameters, computed without allocating memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.user_models.base import UserModel


def shapes_when_built(model: UserModel, num_rows: int, token_embeddings: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that `build` would create, by their names in the state dict.

    Empty for a custom class whose `build` reads the values of the embeddings.

    Args:
        model: The user model; it is not changed.
        num_rows: As for `UserModel.build`.
        token_embeddings: As for `UserModel.build`.
    """
    trial = copy.deepcopy(model)
    try:
        with torch.device("meta"):
            trial.build(num_rows, token_embeddings.detach().to("meta"))
    except ConfigurationError:
        raise
    except Exception:  # tensors on the meta device have no values
        return {}
    return {name: tuple(weight.shape) for name, weight in trial.state_dict().items()}
