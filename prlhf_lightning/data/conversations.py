"""Parsing of texts and conversations in various formats, into strings or messages for chat templates.

Messages may be JSON or Python text (as in CSV), use ShareGPT's `from` and `value`, or have a list of text parts as
content, as OpenAI's do. All are converted to `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

from prlhf_lightning.errors import FeedbackFormatError

Message: TypeAlias = dict[str, Any]
"""One turn: `role`, `content` (a string; None only beside `tool_calls`), and those of `EXTRAS` that it has."""
Text: TypeAlias = str | list[Message]
"""A plain string, or a conversation."""

#: Keys of a message's thoughts; a chat template reads one of them or none.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
#: Other keys of a message; they are passed to the chat template unchanged.
EXTRAS = ("tool_calls", "tool_call_id", "name", "function_call", *THOUGHTS)
_CALLS = ("tool_calls", "function_call")
_FIX = 'each message is {"role": "user" or "assistant" or "system", "content": "..."}, both strings'
# Keys of role and content in other formats, in any case; used if the value is a known role.
_ROLE_NAMES = ("role", "from", "speaker", "author", "sender")
_CONTENT_NAMES = ("content", "value", "text", "message", "parts")
_LISTS = ("messages", "conversations", "conversation", "contents")
# Text that may be serialized messages, and text that certainly is.
_HOLDERS = "|".join((*_ROLE_NAMES, *_LISTS, "message", "choices", "candidates", "output", "content"))
_WRITTEN = re.compile(
    rf"""\s*(?:\[\s*)?(?:\{{.*?['"](?:{_HOLDERS})['"]\s*:|[\[(]\s*['"]\w+['"]\s*,)""", re.DOTALL | re.IGNORECASE
)
_WRITTEN_TWICE = re.compile(r"""\s*"\s*[\[{]""")
_SURELY_WRITTEN = re.compile(r"""\s*(?:array\(\s*)?\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""", re.IGNORECASE)


def fail(where: str, field: str, problem: str, fix: str, kind: str | None = None) -> NoReturn:
    """Raise the error about a field of the row at `where`; `kind` is the problem without the row's values."""
    raise FeedbackFormatError(problem, fix, field=field, where=where, kind=kind)


def check_characters(text: str, where: str, field: str) -> None:
    """Reject a text that cannot be encoded as UTF-8; the message does not quote it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        problem = f"holds U+{ord(text[error.start]):X}, half of a surrogate pair"
        fail(where, field, problem, "remove it or complete it", "holds half of a surrogate pair")


def read_text(value: Any, where: str, field: str) -> Text:
    """Return a string unchanged, and a conversation in any known format as a list of messages.

    Args:
        value: The value in the row.
        where: Location of the row.
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
        value = _inner_list(value, where, field)
    if not isinstance(value, list):
        fail(where, field, f"is of type {type(value).__name__}", "write a string or a list of messages")
    if not value:
        fail(where, field, "is an empty list", "write at least one message")
    return [_message(message, number, where, field) for number, message in enumerate(value, start=1)]


def read_tools(value: Any, where: str, field: str = "tools") -> list[dict[str, Any]] | None:
    """Return tool definitions from a list of JSON schemas or its JSON text; None if there are none.

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
            "is no list of tools",
            "write a list of JSON schemas, as apply_chat_template(tools=...) takes it, or rename the column if it "
            "holds something else",
        )
    return [dict(tool) for tool in value]


def plain_text(text: Text | None) -> str:
    """Return a string unchanged; for a conversation, its contents and tool calls, one per line."""
    if text is None or isinstance(text, str):
        return text or ""
    return "\n".join(message_text(message) for message in text)


def message_text(message: Message) -> str:
    """Return a message's content, and its tool calls as JSON."""
    calls = [json.dumps(message[name], default=str) for name in _CALLS if message.get(name)]
    return "\n".join([part for part in (message["content"], *calls) if part])


def is_blank(message: Message) -> bool:
    """Return whether a message has neither content nor tool calls."""
    return not (message["content"] or "").strip() and not any(message.get(name) for name in _CALLS)


def _read_written(text: str, where: str, field: str) -> Any:
    """Parse a string of messages in JSON or Python syntax; None for any other string."""
    if not text[:1].isspace() and text[:1] not in ("[", "{", '"', "\ufeff", "a"):  # most texts
        return None
    text = text.lstrip().removeprefix("\ufeff")
    if _WRITTEN_TWICE.match(text):
        once = _literal(text)
        return _read_written(once, where, field) if isinstance(once, str) else None
    if not _WRITTEN.match(text) and not _SURELY_WRITTEN.match(text):
        return None
    value = _literal(text)
    if value is None:
        value = _json_lines(text)
    if value is None:
        if _SURELY_WRITTEN.match(text):
            fail(
                where,
                field,
                "looks like a list of messages written as text, but is neither JSON nor a Python list (NumPy arrays, "
                "for one, are printed without commas)",
                "write it with json.dumps(messages), or use JSON Lines",
                "looks like a list of messages written as text, but is neither JSON nor a Python list",
            )
        return None
    messages = _inner_list(value, where, field) if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    standard = [_standard(one) for one in messages]
    if all(isinstance(one, dict) and _is_message(one) for one in standard):
        return messages
    if all(isinstance(one, dict) and _is_like_message(one) for one in messages):
        names = ", ".join(repr(str(name)[:20]) for name in list(messages[0])[:4])
        warnings.warn(
            f"Field {field!r} holds text that is JSON of objects with {names}, which are no messages that can be told "
            "for sure, and stays text. If it is a conversation, write it as a list of messages: "
            '{"role": "user" or "assistant" or "system", "content": "..."}.',
            stacklevel=3,
        )
    return None


def _json_lines(text: str) -> list[Any] | None:
    """Return the objects of a text in JSON Lines; None if a line is not JSON."""
    try:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(one, dict) for one in found) else None


def _literal(text: str) -> Any:
    """Parse JSON or a Python literal; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _inner_list(value: Mapping[str, Any], where: str, field: str) -> Any:
    """Return the messages of an object that contains a list of messages, or is a message itself.

    Responses of the chat APIs of OpenAI, Ollama and Gemini contain one message, too.
    """
    for name in _LISTS:
        if isinstance(value.get(name), list):
            return value[name]
    for name, inner in (("choices", "message"), ("candidates", "content")):
        answers = value.get(name)
        if not isinstance(answers, list) or not answers or not all(isinstance(one, Mapping) for one in answers):
            continue
        if all(isinstance(one.get(inner), Mapping) for one in answers):
            messages = [one[inner] for one in answers]
        elif all(isinstance(one.get("text"), str) for one in answers):
            messages = [{"role": "assistant", "content": one["text"]} for one in answers]
        else:
            continue
        if len(messages) > 1:
            problem = f"is an API's response with {len(messages)} {name}"
            fail(where, field, problem, "keep the one that is meant", f"is an API's response with several {name}")
        return messages
    if isinstance(value.get("output"), list):  # OpenAI's Responses API, next to reasoning
        said = [one for one in value["output"] if isinstance(one, Mapping) and one.get("type") == "message"]
        if said:
            return said
    if isinstance(value.get("message"), Mapping) and "role" in value["message"]:
        return [value["message"]]
    return [value]


def _is_message(value: Mapping[str, Any]) -> bool:
    return ("role" in value and ("content" in value or any(name in value for name in _CALLS))) or (
        "from" in value and "value" in value
    )


def _is_like_message(value: Mapping[str, Any]) -> bool:
    """Return whether an object has the keys of a message in any format, except its role."""
    names = {str(name).lower() for name in value}
    return not names.isdisjoint(_ROLE_NAMES) and not names.isdisjoint(_CONTENT_NAMES)


def _standard(raw: Any) -> Any:
    """Convert a message of another format to the keys `role` and `content`; return anything else unchanged."""
    if isinstance(raw, list | tuple) and len(raw) == 2 and is_role(raw[0]) and isinstance(raw[1], str):
        return {"role": raw[0], "content": raw[1]}
    if not isinstance(raw, Mapping) or ("role" in raw and "content" in raw):
        return raw
    if "from" in raw and "value" in raw and "role" not in raw:  # ShareGPT
        return {**raw, "role": raw["from"], "content": raw["value"]}
    if any(raw.get(name) for name in _CALLS):
        return raw
    by_name = {str(name).lower(): item for name, item in raw.items()}
    role = next((by_name[name] for name in _ROLE_NAMES if name in by_name), None)
    content = next((name for name in _CONTENT_NAMES if name in by_name), None)
    return {**raw, "role": role, "content": by_name[content]} if is_role(role) and content else raw


def _message(raw: Any, number: int, where: str, field: str) -> Message:
    raw = _standard(raw)
    if not isinstance(raw, Mapping):
        kind = f"is of type {type(raw).__name__}"
        fail(where, field, f"message {number} {kind}", _FIX, f"a message {kind}")
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
            f"message {number} has the role 'function_call'",
            "write it as an 'assistant' message with 'tool_calls'",
            "a message has the role 'function_call'",
        )
    calls = extras.get("tool_calls", [])
    if isinstance(calls, str):  # common in Parquet files
        calls = extras["tool_calls"] = _literal(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        fail(
            where,
            field,
            f"message {number} has 'tool_calls' that are no list of calls",
            'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]',
            "a message has 'tool_calls' that are no list of calls",
        )
    check_characters(raw["role"], where, field)
    check_characters(content or "", where, field)
    return {"role": standard_role(raw["role"]), "content": content, **extras}


def _not_a_string(raw: Mapping[str, Any], key: str, number: int, where: str, field: str) -> NoReturn:
    found = f"of type {type(raw[key]).__name__}" if key in raw else "missing"
    kind = f"has a {key!r} that is {found}"
    fail(where, field, f"message {number} {kind}", _FIX, f"a message {kind}")


def _joined(parts: Sequence[Any], number: int, where: str, field: str) -> str:
    """Return the text of a content with several parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") not in ("text", "input_text", "output_text"):
            fail(
                where,
                field,
                f"message {number} has a part of type {str(part['type'])[:40]!r}",
                "only text is supported, so drop the part or the row",
                "a message has a part that is no text",
            )
        if not isinstance(text, str):
            kind = 'has a part that is no {"type": "text", "text": "..."}'
            fail(where, field, f"message {number} {kind}", "write such", f"a message {kind}")
        texts.append(text)
    return "".join(texts)


_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"), "assistant"),
    "observation": "tool",
}


def is_role(name: object) -> bool:
    """Return whether a value is a role of chat templates, or another name for one."""
    return isinstance(name, str) and name.strip().lower() in {*_KNOWN, *_OTHER_NAMES}


def standard_role(role: str) -> str:
    """Return the standard name of a role; warn if few chat templates know the role.

    Some templates write any role, so a wrong name would be trained on silently.
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


_TURN = "\n\nAssistant:"
_USER_TURN = "\n\nHuman:"
_LEAST_SHARED = 2  # words; answers that just start with the same word share less
_LEAST_REPEATED = 16


class Note(NamedTuple):
    """A remark on a row, reported with the number of such rows; it does not stop a run.

    Attributes:
        field: The field.
        problem: The problem.
        fix: The fix.
        sort: The problem without the row's values, if it has any.
    """

    field: str
    problem: str
    fix: str
    sort: str | None = None

    @property
    def kind(self) -> str:
        """What such notes are grouped by."""
        return f"{self.field}: {self.sort or self.problem}"

    @property
    def told(self) -> str:
        """What is so of which field."""
        return f"field {self.field!r} {self.problem}"

    def __str__(self) -> str:
        return f"{self.told}; {self.fix}"


TRANSCRIPT = Note(
    "prompt",
    "is missing and was taken from the transcripts, up to the last 'Assistant:' that they share, as plain text",
    "nothing to do if that is meant; HHRLHFSource with conversations: true makes messages of it for a chat model",
)
MORE_TURNS = Note(
    "chosen",
    "goes on with another turn of 'Human:' (or 'rejected' does)",
    "drop such rows, or a model learns to write as the user",
)
SHARED_START = Note(
    "prompt",
    "is missing and was taken to be the text with which both answers begin, as TRL does",
    "nothing to do if that is meant; else write the prompt to a column of its own",
)
REPEATED = Note(
    "prompt",
    "stands again at the start of the answers, and was left out of them",
    "nothing to do if that is meant; else remove the prompt column",
)

ONE_REPEATS = Note(
    "prompt",
    "stands again at the start of one of the two answers, and was kept there",
    "remove it there, or the model learns from a difference that is not the user's taste",
)


def implicit_prompt(chosen: str, rejected: str | None) -> tuple[str, list[Note]] | None:
    """Return the prompt at the start of the answers, and remarks; None if there seems to be none.

    Args:
        chosen: The preferred answer, with its prompt.
        rejected: The other answer, if there is one.
    """
    shared = chosen if rejected is None else _shared_start(chosen, rejected)
    end = shared.rfind(_TURN)
    if end >= 0 and shared.lstrip().startswith("Human:"):
        end += len(_TURN)
        notes = [TRANSCRIPT]
        if _USER_TURN in chosen[end:] or _USER_TURN in (rejected or "")[end:]:
            notes.append(MORE_TURNS)
        return shared[:end], notes
    if rejected is None:
        return None
    prompt = _whole_words(shared, chosen, rejected)
    if len(prompt.split()) < _LEAST_SHARED or not chosen[len(prompt) :].strip() or not rejected[len(prompt) :].strip():
        return None
    return prompt, [SHARED_START]


def without_prompt(prompt: str, answers: Mapping[str, str]) -> tuple[dict[str, str], list[Note]]:
    """Remove the prompt from the answers if all start with it; also return remarks.

    White space around the prompt is ignored. If only one of two answers starts with it, both stay unchanged. Very short
    prompts are not removed: an answer may start with one by chance.

    Args:
        prompt: The prompt.
        answers: Field and text of each answer.
    """
    asked = prompt.strip()
    if len(asked) < _LEAST_REPEATED or len(asked.split()) < _LEAST_SHARED:
        return dict(answers), []
    repeating = [field for field, answer in answers.items() if answer.lstrip().startswith(asked)]
    if not repeating:
        return dict(answers), []
    if len(repeating) < len(answers):
        return dict(answers), [ONE_REPEATS]
    return {field: _after(prompt, answer) for field, answer in answers.items()}, [REPEATED]


def _after(prompt: str, answer: str) -> str:
    """Return the part of an answer after the prompt; keep the separator in one of the two only."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    rest = answer.lstrip()[len(prompt.strip()) :]
    return rest.lstrip() if prompt[-1:].isspace() else rest


def _shared_start(first: str, second: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:end]


def _whole_words(shared: str, chosen: str, rejected: str) -> str:
    """Cut a shared start to whole words, without a trailing space."""
    following = chosen[len(shared) : len(shared) + 1] + rejected[len(shared) : len(shared) + 1]
    if shared[-1:].isalnum() and any(map(str.isalnum, following)):
        while shared and not shared[-1].isspace():
            shared = shared[:-1]
    return shared.removesuffix(" ")
