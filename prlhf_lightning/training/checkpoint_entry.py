"""The entry of this package in a checkpoint: format, users and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError

KEY = "prlhf_lightning"
#: Increased when older versions can no longer read the files.
FORMAT = 1


def entry_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return this package's entry of a checkpoint.

    Raises:
        ConfigurationError: There is no entry, or only a newer version can read it.
    """
    found = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, dict):
        raise ConfigurationError("This checkpoint was not written by prlhf_lightning: it holds no users.")
    number = found.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise ConfigurationError(
            f"This checkpoint has format {number}, and this version of prlhf_lightning reads formats up to {FORMAT}. "
            "Use the version that wrote it, or a later one."
        )
    users = found.get("users")
    if not isinstance(number, int) or not isinstance(users, list) or not all(isinstance(user, str) for user in users):
        raise ConfigurationError("This checkpoint's `users` is not a list of ids; use a checkpoint that `fit` wrote.")
    return found


def is_reward_model(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is of a reward model, and not of a policy; raises as `entry_of`."""
    return "backbone" in entry_of(checkpoint)


def users_of(checkpoint: Mapping[str, Any]) -> UserVocabulary:
    """Return the users of a checkpoint; raises as `entry_of`."""
    return UserVocabulary(entry_of(checkpoint)["users"])
