"""What the commands write to a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

#: What people's texts may have that steers no terminal though it is no sign: line breaks, spaces, joiners of letters.
LAYOUT = "\n\t\u00a0\u200c\u200d\u202f\u3000"

_LISTED = 5
_MOST_CHARACTERS = 2000  # of an error


def printable(text: str, keep: str = "") -> str:
    r"""Return a text for a terminal, which control characters in it must not steer: they are shown as in `\u001b`.

    Args:
        text: Anybody's text.
        keep: Characters that may stay, such as line breaks.
    """
    return "".join(char if char.isprintable() or char in keep else json.dumps(char)[1:-1] for char in text)


def shortened(text: str) -> str:
    """Return a text, without its middle where it is long, as errors are that quote a file."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def plain_console(**options: Any) -> Console:
    """Return a console for which a text is a text: neither rich's markup nor its names of emoji mean anything in it."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names in one line, and how many there are."""
    return ", ".join(map(printable, names[:_LISTED])) + (f", ... ({len(names):,})" if len(names) > _LISTED else "")
