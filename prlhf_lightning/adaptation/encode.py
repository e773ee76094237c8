"""New users' rows, read off their pairs by a user model that does so, without a pass of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.adaptation.margins import table_rows, users_in
from prlhf_lightning.adaptation.pauses import pause
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.modules.history import pooled
from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens

_PAIRS_AT_ONCE = 1 << 12


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
    by_user: dict[str, list[int]] = {user_id: [] for user_id in user_ids}
    for place, user_id in enumerate(pairs.user_ids):
        by_user[user_id].append(place)
    places = list(by_user.values())
    tables = model.user_model.row_tables()
    pairs = pairs.to(tables[0].device)
    groups = _groups(places)
    found = [_read(model, pairs, [places[user] for user in group]) for group in groups]
    back = torch.tensor([user for group in groups for user in group], dtype=torch.long).argsort()
    new = model.user_model.new_rows(tables)
    rows = {id(table): row.expand(len(user_ids), *row.shape) for table, row in zip(tables, new, strict=True)}
    for table, *parts in zip(model.user_model.history_tables(), *found, strict=True):
        rows[id(table)] = torch.cat(parts)[back]
    return Encoded(user_ids, table_rows(list(rows.values())))


def _groups(places: Sequence[Sequence[int]]) -> list[list[int]]:
    """Divide users for blocks that have as many pairs a user as the one who has most: those with about as many."""
    groups: list[list[int]] = [[]]
    for user in sorted(range(len(places)), key=lambda user: len(places[user])):
        if groups[-1] and (len(groups[-1]) + 1) * len(places[user]) > _PAIRS_AT_ONCE:
            groups.append([])
        groups[-1].append(user)
    return groups


def _read(model: PersonalizedLM, pairs: PreferenceBatch, places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the history rows of users whose pairs stand at `places`."""
    pause()
    most = max(map(len, places), default=0)
    index = torch.tensor([[*own, *[-1] * (most - len(own))] for own in places], dtype=torch.long)
    history = pooled(model.policy, PairTokens(*(_block(part, index) for part in (pairs.chosen, pairs.rejected))))
    return model.user_model.history_rows(history)


def _block(tokens: Tokens, index: Tensor) -> Tokens:
    """Return the rows `[B, K]` of tokens, empty where `index` is -1."""
    index = index.to(tokens.ids.device)
    return Tokens(tokens.ids[index], tokens.mask[index] & (index >= 0)[..., None])
