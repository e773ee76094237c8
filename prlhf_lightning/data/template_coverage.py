"""Check that a chat template renders all of a conversation; many omit tools, calls, thoughts or messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from prlhf_lightning.data.conversations import THOUGHTS, Message
from prlhf_lightning.errors import FeedbackFormatError

Tools: TypeAlias = list[dict[str, Any]] | None
_CALLS = ("tool_calls", "function_call")


@dataclass
class TemplateCoverage:
    """Rejects conversations that a chat template would render incompletely.

    A part is omitted if the template renders the same text without it. Conversations of the same shape (roles, and
    messages with content, calls and thoughts) are tried once.

    Attributes:
        render: Renders messages and tools, or raises a `FeedbackFormatError`.
    """

    render: Callable[[list[Message], Tools], str]
    _tried: set[tuple[Any, ...]] = field(default_factory=set)

    def check(
        self, messages: Sequence[Message], tools: Tools, where: str, fields: Sequence[str], only_last: bool = False
    ) -> None:
        """Reject a conversation that is rendered incompletely.

        Args:
            messages: The conversation; the template must accept it.
            tools: Tool definitions, or None.
            where: Location of the conversation.
            fields: The field of each message.
            only_last: Check only the last message, with its thoughts. (Many templates omit thoughts of earlier turns on
                purpose.)

        Raises:
            FeedbackFormatError: A part is omitted; the message names it.
        """
        shape = (
            only_last,
            bool(tools),
            *((m["role"], bool(m["content"]), any(m.get(name) for name in _CALLS)) for m in messages),
            *_thoughts(messages[-1]),
        )
        if shape in self._tried:
            return
        try:
            whole = self.render(list(messages), tools)
        except FeedbackFormatError:  # the caller reports the reason
            return
        if tools and not only_last and self._same(whole, list(messages), None):
            _refuse(where, "tools", "is left out", "write the tools into a system message, or drop the column")
        for place, message in list(enumerate(messages))[-1 if only_last else 0 :]:
            number = place - list(fields).index(fields[place]) + 1
            fix = "write what it says as a user or assistant message, or drop the row"
            changed = list(messages)
            if any(message.get(name) for name in _CALLS):
                others = {name: value for name, value in message.items() if name not in _CALLS}
                changed[place] = {**others, "content": message["content"] or ""}
                if self._same(whole, changed, tools):
                    fix = "write the call into the message's content, or drop the row"
                    _refuse(where, fields[place], f"message {number} has tool calls, which are left out", fix)
            if message["content"]:
                changed[place] = {**message, "content": message["content"] + "x"}
                if self._same(whole, changed, tools):
                    role = message["role"]
                    _refuse(where, fields[place], f"message {number}, of the role {role!r}, is left out", fix)
        if only_last:
            self._check_thoughts(whole, list(messages), tools, where, fields[-1])
        self._tried.add(shape)

    def _check_thoughts(self, whole: str, messages: list[Message], tools: Tools, where: str, field_name: str) -> None:
        """Reject thoughts of the last message that are not rendered."""
        *before, last = messages
        for name in _thoughts(last):
            thought = last[name]  # may be under two keys, of which the template reads one
            without = {key: value for key, value in last.items() if key not in THOUGHTS or value != thought}
            if not self._same(whole, [*before, without], tools):
                continue
            fix = "write it into the message's content (as <think>...</think>, if the model does), or drop it"
            for other in THOUGHTS:
                if other not in last and not self._same(whole, [*before, {**without, other: thought}], tools):
                    fix = f"rename it to {other!r}, or drop it"
                    break
            _refuse(where, field_name, f"is an assistant message that has {name!r}, which is left out", fix)

    def _same(self, whole: str, messages: list[Message], tools: Tools) -> bool:
        try:
            return self.render(messages, tools) == whole
        except FeedbackFormatError:  # the template does read it
            return False


def _thoughts(message: Message) -> list[str]:
    """Return the keys of a message's thoughts."""
    return [name for name in THOUGHTS if str(message.get(name) or "").strip()]


def _refuse(where: str, field_name: str, problem: str, fix: str) -> NoReturn:
    raise FeedbackFormatError(
        f"{problem} by the tokenizer's chat template",
        f"use a model (or set a chat_template) that writes it, {fix}",
        field=field_name,
        where=where,
        kind="is not written whole by the tokenizer's chat template",
    )
