"""Scores of validation pairs under their own users and under the generic user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prlhf_lightning.adaptation import ColdStartPoint, cold_start
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.splits import Positions, spread
from prlhf_lightning.metrics import UserAccuracy, user_accuracies
from prlhf_lightning.metrics.preference import pair_scores
from prlhf_lightning.model import PersonalizedModel

LEARNED, TESTED = 30, 20
"""Maximum number of pairs of a new user for learning and for testing."""
_LEAST = 8
_NEW_USERS = 30


@dataclass(frozen=True)
class Scores:
    """A model's scores of N pairs.

    Attributes:
        user_ids: User of each pair.
        own: `[N]` 1 if the pair is ranked correctly, 0.5 for a tie, 0 otherwise.
        generic: `[N]` the same under the generic user.
        log_probs: `[N]` each, the log-probability a token of the chosen completion, under the user (`own`), the generic
            user (`generic`) and, where the loss has one, the `reference`.
    """

    user_ids: tuple[str, ...]
    own: Tensor
    generic: Tensor
    log_probs: dict[str, Tensor]

    def by_user(self) -> list[tuple[str, UserAccuracy]]:
        """Return each user's id and accuracy with its interval."""
        names, codes = np.unique(np.asarray(self.user_ids), return_inverse=True)
        rewards = self.own - 0.5
        rows = user_accuracies(torch.from_numpy(codes), rewards, torch.zeros_like(rewards))
        return [(str(names[row.user]), row) for row in rows]


@torch.no_grad()
def score(
    module: PersonalizedModel, pairs: Pairs, places: Positions, batch_size: int, on_batch: Callable[[int], object]
) -> Scores:
    """Return the scores of pairs, computed in batches of similar length.

    Args:
        module: The model, in evaluation mode.
        pairs: A validation set.
        places: `[N]` positions in the set.
        batch_size: Pairs in a pass.
        on_batch: Called with the number of pairs of each pass.
    """
    places = places[np.argsort(pairs.lengths[places], kind="stable")]
    users: list[str] = []
    columns: dict[str, list[Tensor]] = {"own": [], "generic": []}
    log_probs: dict[str, list[Tensor]] = {"own": [], "generic": []}
    for start in range(0, len(places), batch_size):
        batch = collate(pairs.__getitems__(places[start : start + batch_size].tolist())).to(module.device)
        reference = module.reference_log_probs(batch)
        scored = module.log_probs(batch, [False, True] if module.user_model.personalizes else [False])
        for name, found in (("own", scored[0]), ("generic", scored[-1])):
            columns[name].append(pair_scores(*module.loss.rewards(found, reference)).cpu())
            log_probs[name].append(found.chosen.mean.cpu())
        if reference is not None:
            log_probs.setdefault("reference", []).append(reference.chosen.mean.cpu())
        users += batch.user_ids
        on_batch(len(batch))
    own, generic = (torch.cat(columns[name]) for name in ("own", "generic"))
    return Scores(tuple(users), own, generic, {name: torch.cat(parts) for name, parts in log_probs.items()})


def cold_start_of(module: PersonalizedModel, pairs: Pairs | None) -> list[ColdStartPoint] | str:
    """Return the cold-start curve of unseen users, who are learned from their first pairs and tested on their last.

    Args:
        module: The model.
        pairs: The unseen users' pairs, or None.

    Returns:
        The curve, or the reason why there is none.
    """
    if not module.user_model.row_tables():
        return f"{type(module.user_model).__name__} has no rows of users, so there is nothing to learn of a new one."
    places = new_users_places(pairs)
    if pairs is None or isinstance(places, str):
        return str(places)
    known, held = (collate(pairs.__getitems__(part)).to(module.device) for part in places)
    return cold_start(module, known, held)


def new_users_places(pairs: Pairs | None) -> tuple[list[int], list[int]] | str:
    """Return the places of unseen users' first pairs, to learn from, and of their last, to test on.

    Args:
        pairs: The unseen users' pairs, or None.

    Returns:
        The places, or the reason why there are none.
    """
    if pairs is None:
        return "There are no pairs of users whom training did not meet (see data.unseen_user_fraction)."
    codes = pairs.split.users[pairs.positions]
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    own = [places for places in groups if len(places) >= _LEAST]
    if not own:
        return f"No unseen user has {_LEAST} pairs, to learn from some and test on others."
    learned, tested = [], []
    for number in spread(len(own), _NEW_USERS):
        places = own[number]
        held_out = min(TESTED, max(len(places) // 4, _LEAST // 2))
        learned += places[:-held_out][:LEARNED].tolist()
        tested += places[-held_out:].tolist()
    return learned, tested


def rows_by_user(pairs: Pairs, user_ids: Sequence[str], most: int) -> dict[str, list[int]]:
    """Return up to `most` positions of each user's rows in a set, for users with any."""
    codes = pairs.split.users[pairs.positions]
    code_of = {user_id: code for code, user_id in enumerate(pairs.split.user_ids)}
    found = {user_id: np.flatnonzero(codes == code_of[user_id])[:most] for user_id in user_ids if user_id in code_of}
    return {user_id: places.tolist() for user_id, places in found.items() if len(places)}
