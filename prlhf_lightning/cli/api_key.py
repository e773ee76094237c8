"""The command `api-key`."""

from __future__ import annotations

from pathlib import Path

from prlhf_lightning.serving.auth import add_entry, new_key


def api_key(name: str, user_pattern: str = "*", keys: Path | None = None) -> None:
    """Create an API key and print it with the entry for the key file of `serve`, which holds only the hash.

    Args:
        name: Name of the key in logs.
        user_pattern: Pattern of the users that the key may act for, such as 'team-a-*'.
        keys: Key file to which it is added; a new file is readable only by its owner.
    """
    key, entry = new_key(name, user_pattern)
    if keys is None:
        print(f"The key, which is not stored: {key}\n\nFor the key file:\n\n{entry}")
    else:
        add_entry(keys, entry)
        print(f"The key, which is not stored: {key}\n\nIts hash has been added to {keys}.")
