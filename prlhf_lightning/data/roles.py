"""Roles of the messages of a conversation: those that chat templates know, and other names for them."""

from __future__ import annotations

import warnings

_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"), "assistant"),
    "observation": "tool",
}


def is_role(name: object) -> bool:
    """Return whether something is the name of a role, as chat templates know it or another name for it."""
    return isinstance(name, str) and name.strip().lower() in {*_KNOWN, *_OTHER_NAMES}


def standard_role(role: str) -> str:
    """Return a role by the name that chat templates know; warn of one that few of them know.

    Some templates write any role as it is, so that one under another name would be trained on without a word.
    """
    if role in _KNOWN:
        return role
    name = role.strip().lower()
    if meant := _OTHER_NAMES.get(name) or (name if name in _KNOWN else None):
        return meant
    told = role if len(role) <= 40 else role[:40] + "..."
    warnings.warn(
        f"A message has the role {told!r}, which few chat templates know; usual ones are {', '.join(_KNOWN)}.",
        stacklevel=2,
    )
    return role
