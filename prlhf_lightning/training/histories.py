"""Pooled input embeddings of users' pairs, for user models that read pairs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from prlhf_lightning.data.batching import USERS_AT_ONCE
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.model import pool_history
from prlhf_lightning.policies import Policy
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.utils.progress import tracked

_WORTH_A_BAR = 10_000  # users


@torch.no_grad()
def keep_histories(user_model: UserModel, policy: Policy, vocabulary: UserVocabulary, data: Any) -> None:
    """Fill the user model's rows from the pairs of the training users; other rows do not change.

    Args:
        user_model: A user model that reads histories.
        policy: A policy that has been built with a reference.
        vocabulary: The users of the tables' rows.
        data: The data module.
    """
    tables = user_model.history_tables()
    device = tables[0].device
    is_short = len(vocabulary) < _WORTH_A_BAR or getattr(rank_zero_only, "rank", 0) != 0
    blocks = len(vocabulary) / USERS_AT_ONCE
    for user_ids, pairs in tracked(data.histories(), "Users' histories", blocks, show=not is_short):
        rows = vocabulary.rows(user_ids).to(device)
        known = rows > 0  # a checkpoint may not know all of the data's users
        for table, found in zip(tables, user_model.history_rows(pool_history(policy, pairs.to(device))), strict=True):
            table[rows[known]] = found[known].to(table.dtype)


def check_histories(user_model: UserModel, loss: PreferenceLoss, data: Any) -> None:
    """Refuse to train a user model that reads histories on data without them.

    Raises:
        ConfigurationError: Names the setting.
    """
    size, name = user_model.history_size, type(user_model).__name__
    if not size:
        return
    if loss.feedback != "pairs":
        raise ConfigurationError(
            f"{name} reads which of two completions users preferred, and {type(loss).__name__} takes {loss.feedback}: "
            "choose a loss that ranks pairs, such as DPOLoss, or another user model, such as IndividualUserModel."
        )
    if getattr(data, "history_size", 0) != size:
        raise ConfigurationError(
            f"{name} reads up to {size} pairs of a user with each training pair, and the data module gives "
            f"{getattr(data, 'history_size', 0)}: pass history_size={size} to PreferenceDataModule."
        )
