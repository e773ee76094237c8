"""The command `api-key`."""

from __future__ import annotations

from pathlib import Path

from prlhf_lightning.serving.auth import add_entry, new_key


def api_key(name: str, user_pattern: str = "*", keys: Path | None = None) -> None:
    """Make an API key: print it, and what to add to the file of keys that `serve` reads, which holds only its hash.

    Args:
        name: What the key is called in logs.
        user_pattern: Pattern of the users whom it may write and give feedback for, such as 'team-a-*'.
        keys: File of keys to add it to; a new one can be read by its owner alone.
    """
    key, entry = new_key(name, user_pattern)
    if keys is None:
        print(f"The key, which is not kept anywhere: {key}\n\nFor the file of keys:\n\n{entry}")
    else:
        add_entry(keys, entry)
        print(f"The key, which is not kept anywhere: {key}\n\nIts hash has been added to {keys}.")
