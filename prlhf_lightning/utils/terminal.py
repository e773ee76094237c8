"""Safe output of texts to a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

#: Non-printable characters that are common in texts and harmless to a terminal: line breaks, spaces, letter joiners.
LAYOUT = "\n\t\u00a0\u200c\u200d\u202f\u3000"

_LISTED = 5
_MOST_CHARACTERS = 2000  # of an error


def printable(text: str, keep: str = "") -> str:
    r"""Escape control characters in a text, as in `\u001b`, so they cannot control the terminal.

    Args:
        text: An untrusted text.
        keep: Characters that are not escaped, such as line breaks.
    """
    return "".join(char if char.isprintable() or char in keep else json.dumps(char)[1:-1] for char in text)


def shortened(text: str) -> str:
    """Return a text without its middle if it is long, such as an error that quotes a file."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def plain_console(**options: Any) -> Console:
    """Return a rich console that prints texts literally, without markup, emoji names or highlighting."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def listed(names: Sequence[str]) -> str:
    """Return the first few names in one line; if there are more, also their number."""
    return ", ".join(map(printable, names[:_LISTED])) + (f", ... ({len(names):,})" if len(names) > _LISTED else "")
