"""What stands in a checkpoint beside Lightning's own entries: its format, and the users with their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError

KEY = "prlhf_lightning"
#: Raised when files can no longer be read by versions that read the last one.
FORMAT = 1


def entry(
    users: UserVocabulary | None, new_rows: Mapping[str, Tensor], shares: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return the entry.

    Args:
        users: Those whose rows the tables hold.
        new_rows: For each table of rows, by its name in the state dict, the row that a user gets who is added. It is
            kept here so that users can be added to and removed from a file without building its model.
        shares: Names of the tables whose rows are unnormalised weights.
        seed: What chance was drawn from.
    """
    return {
        "format": FORMAT,
        "users": list(users.ids) if users is not None else [],
        "new_rows": dict(new_rows),
        "shares": list(shares),
        "seed": seed,
    }


def entry_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a checkpoint that this version can read.

    Raises:
        ConfigurationError: It has none, or one that only a newer version understands.
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
        raise ConfigurationError("This checkpoint's list of users is not one; use a checkpoint that `fit` wrote.")
    return found


def users_of(checkpoint: Mapping[str, Any]) -> UserVocabulary:
    """Return the users of a checkpoint; raises as `entry_of`."""
    return UserVocabulary(entry_of(checkpoint)["users"])
