"""Texts and conversations in the forms in which data sets hold them, read as strings or as messages for chat templates.

Messages may be JSON or Python text (CSV has no other way), may be ShareGPT's `from` and `value`, and their content may
be a list of text parts, as OpenAI's. All are read as `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from prlhf_lightning.data.roles import standard_role
from prlhf_lightning.errors import FeedbackFormatError

Message: TypeAlias = dict[str, Any]
"""One turn: `role`, `content` (a string; None only beside `tool_calls`), and those of `EXTRAS` that it has."""
Text: TypeAlias = str | list[Message]
"""A plain string, or a conversation."""

#: Where messages hold thoughts: under one of these names, of which a chat template reads one or none.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
#: What a message may hold beside role and content; it reaches the chat template as it is.
EXTRAS = ("tool_calls", "tool_call_id", "name", "function_call", *THOUGHTS)
_CALLS = ("tool_calls", "function_call")
_FIX = 'each message is {"role": "user" or "assistant" or "system", "content": "..."}, both strings'
# Text that can be messages written out, and text that cannot be meant as anything else.
_WRITTEN = re.compile(r"""\s*(?:\[\s*)?\{.*?['"](?:role|from|messages|conversations?)['"]\s*:""", re.DOTALL)
_SURELY_WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_LISTS = ("messages", "conversations", "conversation")


def fail(where: str, field: str, problem: str) -> NoReturn:
    """Raise the error about a field of the row at `where`."""
    raise FeedbackFormatError(f"{where}: field {field!r} {problem}.")


def check_characters(text: str, where: str, field: str) -> None:
    """Refuse a text that cannot be encoded, without quoting it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text can hold
        fail(where, field, f"holds U+{ord(text[error.start]):X}, half of a surrogate pair; remove it or complete it")


def read_text(value: Any, where: str, field: str) -> Text:
    """Return a string as it is, and a conversation in any of the known forms as a list of messages.

    Args:
        value: What the row holds.
        where: Where the row stands.
        field: The field, for messages.

    Raises:
        FeedbackFormatError: It is neither; the message says what to write.
    """
    if isinstance(value, str):
        check_characters(value, where, field)
        written = _read_written(value, where, field)
        if written is None:
            return value
        value = written
    if isinstance(value, Mapping):
        value = _inner_list(value)
    if not isinstance(value, list):
        fail(where, field, f"is of type {type(value).__name__}; write a string or a list of messages")
    if not value:
        fail(where, field, "is an empty list; write at least one message")
    return [_message(message, number, where, field) for number, message in enumerate(value, start=1)]


def read_tools(value: Any, where: str, field: str = "tools") -> list[dict[str, Any]] | None:
    """Return the tools that an assistant may call, from a list of JSON schemas or its JSON text; None if there is none.

    Raises:
        FeedbackFormatError: It is something else.
    """
    if isinstance(value, str):
        if value.strip().lower() in ("", "null", "none"):
            return None
        read = _literal(value)
        value = value if read is None else read
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        fail(
            where,
            field,
            "is no list of tools; write a list of JSON schemas, as apply_chat_template(tools=...) takes it, or rename "
            "the column if it holds something else",
        )
    return [dict(tool) for tool in value]


def plain_text(text: Text | None) -> str:
    """Return all that is written in a text: of a conversation the contents and tool calls, a line each."""
    if text is None or isinstance(text, str):
        return text or ""
    return "\n".join(message_text(message) for message in text)


def message_text(message: Message) -> str:
    """Return what is written in a message: its content, and its tool calls as JSON."""
    calls = [json.dumps(message[name], default=str) for name in _CALLS if message.get(name)]
    return "\n".join([part for part in (message["content"], *calls) if part])


def is_blank(message: Message) -> bool:
    """Return whether a message says nothing and calls no tool."""
    return not (message["content"] or "").strip() and not any(message.get(name) for name in _CALLS)


def _read_written(text: str, where: str, field: str) -> Any:
    """Return the messages that a string spells out as JSON or as Python prints them; None for any other string."""
    if not text[:1].isspace() and text[:1] not in ("[", "{"):  # most texts
        return None
    if not _WRITTEN.match(text):
        return None
    value = _literal(text)
    if value is None:
        if _SURELY_WRITTEN.match(text):
            fail(
                where,
                field,
                "looks like a list of messages written as text, but is neither JSON nor a Python list (NumPy arrays, "
                "for one, are printed without commas); write it with json.dumps(messages), or use JSON Lines",
            )
        return None
    messages = _inner_list(value) if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    return messages if all(isinstance(one, dict) and _is_message(one) for one in messages) else None


def _literal(text: str) -> Any:
    """Return what JSON, or a Python literal, spells; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _inner_list(value: Mapping[str, Any]) -> Any:
    """Return the messages of an object that holds a list of them, or that is one itself."""
    for name in _LISTS:
        if isinstance(value.get(name), list):
            return value[name]
    return [value]


def _is_message(value: Mapping[str, Any]) -> bool:
    return ("role" in value and ("content" in value or any(name in value for name in _CALLS))) or (
        "from" in value and "value" in value
    )


def _message(raw: Any, number: int, where: str, field: str) -> Message:
    if not isinstance(raw, Mapping):
        fail(where, field, f"message {number} is of type {type(raw).__name__}; {_FIX}")
    if "from" in raw and "value" in raw and "role" not in raw:  # ShareGPT
        raw = {**raw, "role": raw["from"], "content": raw["value"]}
    elif "parts" in raw and "content" not in raw:  # Gemini
        raw = {**raw, "content": raw["parts"]}
    extras = {name: raw[name] for name in EXTRAS if raw.get(name) not in (None, [], "")}
    if not isinstance(raw.get("role"), str):
        _not_a_string(raw, "role", number, where, field)
    content = raw.get("content")
    if isinstance(content, list):
        content = _joined(content, number, where, field)
    if not isinstance(content, str) and not (content is None and any(extras.get(name) for name in _CALLS)):
        _not_a_string(raw, "content", number, where, field)
    if raw["role"] == "function_call":  # LLaMA-Factory
        fail(
            where,
            field,
            f"message {number} has the role 'function_call'; write it as an 'assistant' message with 'tool_calls'",
        )
    calls = extras.get("tool_calls", [])
    if isinstance(calls, str):  # as Parquet files often hold it
        calls = extras["tool_calls"] = _literal(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        fail(
            where,
            field,
            f"message {number} has 'tool_calls' that are no list of calls; write "
            '[{"type": "function", "function": {"name": "...", "arguments": {...}}}]',
        )
    check_characters(raw["role"], where, field)
    check_characters(content or "", where, field)
    return {"role": standard_role(raw["role"]), "content": content, **extras}


def _not_a_string(raw: Mapping[str, Any], key: str, number: int, where: str, field: str) -> NoReturn:
    found = f"of type {type(raw[key]).__name__}" if key in raw else "missing"
    fail(where, field, f"message {number} has a {key!r} that is {found}; {_FIX}")


def _joined(parts: Sequence[Any], number: int, where: str, field: str) -> str:
    """Return the text of a content that is given in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") not in ("text", "input_text", "output_text"):
            fail(
                where,
                field,
                f"message {number} has a part of type {str(part['type'])[:40]!r}; only text is supported, so drop the "
                "part or the row",
            )
        if not isinstance(text, str):
            fail(where, field, f'message {number} has a part that is no {{"type": "text", "text": "..."}}; write such')
        texts.append(text)
    return "".join(texts)
