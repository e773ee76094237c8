"""What the commands write to a terminal."""

from __future__ import annotations

import json


def printable(text: str, keep: str = "") -> str:
    r"""Return a text for a terminal, which control characters in it must not steer: they are shown as in `\u001b`.

    Args:
        text: Anybody's text.
        keep: Characters that may stay, such as line breaks.
    """
    return "".join(char if char.isprintable() or char in keep else json.dumps(char)[1:-1] for char in text)
