"""New users' rows, read off their pairs by a user model that does so, without a pass of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.adaptation.margins import table_rows, users_in
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.modules.history import pooled
from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens


@dataclass(frozen=True)
class Encoded:
    """What was read of B users.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: the numbers of all row tables side by side.
    """

    user_ids: tuple[str, ...]
    rows: Tensor


@torch.no_grad()
def encode_users(model: PersonalizedLM, pairs: PreferenceBatch, user_ids: Sequence[str] | None = None) -> Encoded:
    """Read users off their pairs; the model is left as it is.

    Tables that pairs say nothing of, such as those of an `IndividualUserModel` beside, get the rows of a new user.

    Args:
        model: A trained model.
        pairs: N pairs, in any order, on any device.
        user_ids: The users; those of the pairs by default. One without a pair gets the row of a new user.

    Raises:
        ConfigurationError: The user model reads no pairs, or a pair is of a user who is not among those that are named.
    """
    if not model.user_model.history_size:
        raise ConfigurationError(
            f"encode_users: {type(model.user_model).__name__} reads no pairs; learn users' rows with adapt_users."
        )
    user_ids = users_in(pairs, user_ids)
    places: dict[str, list[int]] = {user_id: [] for user_id in user_ids}
    for place, user_id in enumerate(pairs.user_ids):
        places[user_id].append(place)
    tables = model.user_model.row_tables()
    pairs = pairs.to(tables[0].device)
    most = max(map(len, places.values()), default=0)
    index = torch.tensor([[*own, *[-1] * (most - len(own))] for own in places.values()], dtype=torch.long)
    history = pooled(model.policy, PairTokens(*(_block(part, index) for part in (pairs.chosen, pairs.rejected))))
    new, found = model.user_model.new_rows(tables), model.user_model.history_rows(history)
    rows = {id(table): row.expand(len(user_ids), *row.shape) for table, row in zip(tables, new, strict=True)}
    rows |= {id(table): read for table, read in zip(model.user_model.history_tables(), found, strict=True)}
    return Encoded(user_ids, table_rows(list(rows.values())))


def _block(tokens: Tokens, index: Tensor) -> Tokens:
    """Return the rows `[B, K]` of tokens, empty where `index` is -1."""
    index = index.to(tokens.ids.device)
    return Tokens(tokens.ids[index], tokens.mask[index] & (index >= 0)[..., None])
