"""Roles of the messages of a conversation: those that chat templates know, and other names for them."""

from __future__ import annotations

import warnings

_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai"), "assistant"),
}


def problem_with_role(role: str) -> str | None:
    """Return what is wrong with a role and how to mend it; warn of one that few chat templates know.

    Some templates write any role as it is, so that one under another name would be trained on without a word.
    """
    if role in _KNOWN:
        return None
    name = role.strip().lower()
    if meant := _OTHER_NAMES.get(name) or (name if name in _KNOWN else None):
        return f"the role {role!r}, which chat templates do not know; write {meant!r}"
    told = role if len(role) <= 40 else role[:40] + "..."
    warnings.warn(
        f"A message has the role {told!r}, which few chat templates know; usual ones are {', '.join(_KNOWN)}.",
        stacklevel=2,
    )
    return None
