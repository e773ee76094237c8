"""Deterministic splits into training and validation, from the content of each row and a seed.

Whether a row is held out depends only on its own user, prompt and completions. So rows appended to a file do not move
other rows between the splits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.records import Text

SplitBy: TypeAlias = Literal["prompt", "pair"]
Positions: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrainValidation:
    """Positions `[n]` of the rows of each part, ascending.

    Attributes:
        train: Training rows.
        seen: Held-out rows of users with training rows.
        unseen: Rows of users without training rows.
        orphans: Number of users whose rows are all in validation by chance; they count as unseen.
    """

    train: Positions
    seen: Positions
    unseen: Positions
    orphans: int


def spread(length: int, most: int) -> Positions:
    """Return up to `most` positions, evenly spaced over `length`."""
    return np.linspace(0, length - 1, min(length, most)).astype(np.int64)


def text_key(text: Text) -> int:
    """Return a 64-bit hash of a text."""
    text = text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def split_train_validation(
    users: npt.NDArray[np.int32],
    user_ids: list[str],
    keys: npt.NDArray[np.int64],
    validation_fraction: float,
    unseen_user_fraction: float,
    seed: int,
) -> TrainValidation:
    """Split rows into training, seen-user validation and unseen-user validation.

    Args:
        users: `[N]` index of each row's user in `user_ids`.
        user_ids: `[U]` the users.
        keys: `[N]` hash of the content that must not be in both splits: the prompt, or prompt and completions. Rows of
            unseen users are exempt: they are all validation, and test new users instead of new prompts.
        validation_fraction: Share of the keys whose rows are held out.
        unseen_user_fraction: Share of the users whose rows are all held out.
        seed: Seed of the split.
    """
    unseen_users = held_out_users(user_ids, unseen_user_fraction, seed)
    held_out = _below(keys.view(np.uint64), validation_fraction, seed)
    train = ~unseen_users[users] & ~held_out
    trained = np.zeros(len(user_ids), dtype=bool)
    trained[users[train]] = True
    known = trained[users]
    return TrainValidation(
        train=np.flatnonzero(train),
        seen=np.flatnonzero(~train & known),
        unseen=np.flatnonzero(~known),
        orphans=int((~trained & ~unseen_users).sum()),
    )


def held_out_users(user_ids: list[str], fraction: float, seed: int) -> Mask:
    """Return `[U]` whether each user is held out of training."""
    hashes = np.array([text_key(user_id) for user_id in user_ids], dtype=np.uint64)
    # Another seed than for rows, in case a prompt equals a user id.
    return _below(hashes, fraction, seed ^ 0x5DEECE66D)


def _below(hashes: npt.NDArray[np.uint64], fraction: float, seed: int) -> Mask:
    """Return whether each hash, mixed with the seed, is in the lowest fraction of its range."""
    mixed = _mix(hashes + _mix(np.array([seed], dtype=np.uint64)))
    below: Mask = (mixed >> np.uint64(11)) < np.uint64(fraction * 2**53)
    return below


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit integers (the finalizer of splitmix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
