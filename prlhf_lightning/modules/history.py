"""Users' pairs as a user model that reads them sees them: pooled input embeddings."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.policies import Policy
from prlhf_lightning.types import History, PairTokens, Tokens
from prlhf_lightning.user_models import UserModel

_WORTH_A_BAR = 10_000  # users


@torch.no_grad()
def pooled(policy: Policy, pairs: PairTokens) -> History:
    """Return the mean input embeddings of users' completions, as the reference embeds them.

    The reference does not change in training, so that what is kept of a history stays true. The policy is asked once,
    whatever there is to embed: where it is sharded all processes must ask as often.

    Args:
        policy: A policy that has been built with a reference.
        pairs: Histories `[B, K, L]`.
    """
    sides = [Tokens(side.ids.flatten(0, 1), side.mask.flatten(0, 1)) for side in (pairs.chosen, pairs.rejected)]
    embedded = policy.embed(Tokens.concat(sides), reference=True)
    lengths = embedded.mask.sum(1)
    sums = torch.where(embedded.mask[..., None], embedded.vectors.float(), 0.0).sum(1)
    means = sums / lengths.clamp(min=1)[:, None]
    shape = 2, *pairs.chosen.mask.shape[:2]
    chosen, rejected = means.view(*shape, means.shape[1])
    return History(chosen, rejected, lengths.view(shape).permute(1, 2, 0))


@torch.no_grad()
def keep_histories(user_model: UserModel, policy: Policy, vocabulary: UserVocabulary, data: Any) -> None:
    """Fill the user model's rows with what the training users' pairs say; other users' rows stay as they are.

    Args:
        user_model: A user model that reads histories.
        policy: A policy that has been built with a reference.
        vocabulary: Whose rows the tables hold.
        data: The data module.
    """
    tables = user_model.row_tables()
    device = tables[0].device
    is_short = len(vocabulary) < _WORTH_A_BAR or getattr(rank_zero_only, "rank", 0) != 0
    for user_ids, pairs in track(data.histories(), "Users' histories", len(vocabulary) / 256, disable=is_short):
        rows = vocabulary.rows(user_ids).to(device)
        known = rows > 0  # a checkpoint may not know all of the data's users
        for table, found in zip(tables, user_model.history_rows(pooled(policy, pairs.to(device))), strict=True):
            if found is not None:
                table[rows[known]] = found[known].to(table.dtype)


def check_histories(user_model: UserModel, loss: PreferenceLoss, data: Any) -> None:
    """Refuse to train a user model that reads histories on what has none.

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
