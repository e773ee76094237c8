"""One row of feedback, validated: raw mapping in, `FeedbackRecord` out, or an error that says how to mend the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias

from prlhf_lightning.data.roles import problem_with_role
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.types import Feedback

Message: TypeAlias = dict[str, str]
"""`{"role": ..., "content": ...}`, one turn of a conversation."""
Text: TypeAlias = str | list[Message]
"""A plain string, or a conversation."""


@dataclass(frozen=True)
class Columns:
    """The name of the column that holds each field."""

    user_id: str = "user_id"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    user_text: str = "user_text"

    @classmethod
    def from_mapping(cls, columns: Mapping[str, str]) -> Columns:
        """Build from the entries that differ from the defaults, refusing fields that do not exist."""
        known = [field.name for field in fields(cls)]
        for name in columns:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigurationError(
                    f"columns: there is no field {name!r}{hint}; the fields are {', '.join(known)}, "
                    "and each maps to the name of its column in the data."
                )
        return cls(**columns)


@dataclass(frozen=True)
class FeedbackRecord:
    """One judgement of one user.

    Attributes:
        user_id: Who judged.
        prompt: What was asked; a string, or the conversation so far.
        chosen: The preferred completion; a string, or a list of one assistant message. None for a thumbs-down.
        rejected: The other completion; None in demonstrations, and for a thumbs-up.
        user_text: Text about the user, or None.
        thumb: Whether the row had one completion and a label, and not up to two completions.
    """

    user_id: str
    prompt: Text
    chosen: Text | None
    rejected: Text | None = None
    user_text: str | None = None
    thumb: bool = False

    @property
    def fields(self) -> tuple[str, str]:
        """Names, for messages, of the fields that `chosen` and `rejected` stood in."""
        return ("completion", "completion") if self.thumb else ("chosen", "rejected")


_LABELS = {"true": True, "false": False, "1": True, "0": False}


class TieError(FeedbackFormatError):
    """The two completions of a row are the same."""


_DEFAULT_COLUMNS = Columns()


def parse_record(
    row: Mapping[str, Any], where: str, columns: Columns = _DEFAULT_COLUMNS, feedback: Feedback = "pairs"
) -> FeedbackRecord:
    """Validate one raw row.

    Conversational rows may leave `prompt` out: the messages that `chosen` and `rejected` share (or all but the last of
    `completion`) are then the prompt, and the last message of each is the completion. Other columns are ignored.

    Args:
        row: Column name to value.
        where: Where the row stands, such as `votes.jsonl:17`; every message starts with it.
        columns: The column of each field.
        feedback: What the row must have: `pairs` have `chosen` and `rejected`; `thumbs` have `completion` and `label`,
            and give a record with one of the two; `demonstrations` have `chosen`, and may have `rejected`.

    Raises:
        FeedbackFormatError: The row is not what it should be; the message names the place, the field and the fix.
        TieError: The row is well formed, but both completions are the same.
    """
    user_id = parse_user_id(row, where, columns)
    if feedback == "thumbs":
        return _parse_thumb(user_id, row, where, columns)
    chosen = _text(_required(row, where, "chosen", columns), where, "chosen")
    rejected: Text | None = None
    if feedback == "pairs" or row.get(columns.rejected):
        rejected = _text(_required(row, where, "rejected", columns), where, "rejected")
        if isinstance(rejected, str) != isinstance(chosen, str):
            _fail(where, "rejected", "and 'chosen' must both be strings or both be lists of messages")
    prompt, chosen = _split_prompt(row, where, columns, chosen, "chosen")
    if rejected is not None:
        rejected = _split_rejected(row, where, columns, rejected, prompt)
    _check_completion(chosen, where, "chosen")
    if rejected is not None:
        _check_completion(rejected, where, "rejected")
        if chosen == rejected:
            raise TieError(
                f"{where}: field 'chosen' equals 'rejected', so the row says nothing about what the user prefers; "
                "drop the row, or set ties: drop to leave such rows out."
            )
    return FeedbackRecord(user_id, prompt, chosen, rejected, _user_text(row, where, columns))


def _parse_thumb(user_id: str, row: Mapping[str, Any], where: str, columns: Columns) -> FeedbackRecord:
    completion = _text(_required(row, where, "completion", columns), where, "completion")
    prompt, completion = _split_prompt(row, where, columns, completion, "completion")
    _check_completion(completion, where, "completion")
    value = _required(row, where, "label", columns)
    # CSV has texts only, and many tables have 1 and 0 for true and false.
    up = _LABELS.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    if up is None:
        _fail(
            where,
            "label",
            f"is {_shown(value)}, of type {type(value).__name__}; write true (or 1) for a thumbs-up and "
            "false (or 0) for a thumbs-down",
        )
    chosen, rejected = (completion, None) if up else (None, completion)
    return FeedbackRecord(user_id, prompt, chosen, rejected, _user_text(row, where, columns), thumb=True)


def parse_user_id(row: Mapping[str, Any], where: str, columns: Columns = _DEFAULT_COLUMNS) -> str:
    """Return the id of the user of a raw row, or raise a `FeedbackFormatError`; see `parse_record`."""
    user_id: Any = _required(row, where, "user_id", columns)
    if not isinstance(user_id, str):
        _fail(
            where,
            "user_id",
            f"is of type {type(user_id).__name__}; write it as a string (in files, whole numbers are read as strings; "
            "pandas makes numbers like 7.0 of a column with gaps: fill or drop these rows first)",
        )
    check_characters(user_id, where, "user_id")
    if not user_id.strip():
        _fail(where, "user_id", "is empty; every row needs the id of the person who judged, so drop or fill this row")
    return user_id


def spell_user_id(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """Return a raw row with a whole number for an id, as databases have it, written out: `7` as `"7"`.

    No two ids become one by it. Sources do it before anything is done with their rows, so that pseudonyms, counts and
    messages are of the id as written out. All else is left for validation to refuse.
    """
    user_id = row.get(column)
    return {**row, column: str(user_id)} if type(user_id) is int else row  # True is no id


def _fail(where: str, field: str, problem: str) -> NoReturn:
    raise FeedbackFormatError(f"{where}: field {field!r} {problem}.")


def _required(row: Mapping[str, Any], where: str, field: str, columns: Columns) -> Any:
    """Return the value of a field, or say how to map or fill the column that should hold it."""
    column = getattr(columns, field)
    value = row.get(column)
    if value is not None:
        return value
    if column in row:
        _fail(where, field, f"is null (column {column!r}); fill it or drop the row")
    if (kind := _other_kind(row, field, columns)) is not None:
        _fail(where, field, f"is missing: {kind}")
    names = [str(name) for name in row]
    close = get_close_matches(column, names, n=1) or get_close_matches(field, names, n=1)
    advice = (
        f"if {close[0]!r} holds it, rename that column or set columns: {{{field}: {close[0]}}}"
        if close
        else f"name the column that holds it with columns: {{{field}: <its name>}}"
    )
    _fail(where, field, f"is missing: there is no column {column!r} among {', '.join(map(repr, names))}; {advice}")


def _other_kind(row: Mapping[str, Any], field: str, columns: Columns) -> str | None:
    """Return what to do about a row that lacks a field because it is feedback of another kind."""
    if field in ("chosen", "rejected") and columns.completion in row and columns.label in row:
        return "the row is a thumb up or down, where a pair is needed; to train on thumbs, take a loss such as KTOLoss"
    if field in ("completion", "label") and columns.chosen in row and columns.rejected in row:
        return (
            "the row is a pair, which another loss takes, such as DPOLoss; or write it as two rows, each with one "
            "completion and a label"
        )
    return None


def _text(value: Any, where: str, field: str) -> Text:
    """Check that a value is a string or a list of well-formed messages."""
    if isinstance(value, str):
        check_characters(value, where, field)
        return value
    if not isinstance(value, list):
        _fail(where, field, f"is of type {type(value).__name__}; write a string or a list of messages")
    if not value:
        _fail(where, field, "is an empty list; write at least one message")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            _fail(where, field, f"message {number} is of type {type(message).__name__}; {_MESSAGE_FIX}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"of type {type(message[key]).__name__}" if key in message else "missing"
                _fail(where, field, f"message {number} has a {key!r} that is {found}; {_MESSAGE_FIX}")
            check_characters(message[key], where, field)
        if (problem := problem_with_role(message["role"])) is not None:
            _fail(where, field, f"message {number} has {problem}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _user_text(row: Mapping[str, Any], where: str, columns: Columns) -> str | None:
    """Return the text about the user, which may be absent unless its column was named on purpose."""
    value = row.get(columns.user_text)
    if value is None:
        if columns.user_text != _DEFAULT_COLUMNS.user_text and columns.user_text not in row:
            _required(row, where, "user_text", columns)
        return None
    if not isinstance(value, str):
        _fail(where, "user_text", f"is of type {type(value).__name__}; write a string, or null where there is none")
    check_characters(value, where, "user_text")
    return value if value.strip() else None


def check_characters(text: str, where: str, field: str) -> None:
    """Refuse a text that cannot be encoded, without quoting it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text can hold
        _fail(where, field, f"holds U+{ord(text[error.start]):X}, half of a surrogate pair; remove it or complete it")


_MESSAGE_FIX = 'each message is {"role": "user" or "assistant" or "system", "content": "..."}, both strings'


def _split_prompt(
    row: Mapping[str, Any], where: str, columns: Columns, completion: Text, field: str
) -> tuple[Text, Text]:
    """Return prompt and completion, splitting off a prompt that stands inside a conversational completion."""
    given = row.get(columns.prompt)
    if isinstance(completion, str):
        prompt = _text(_required(row, where, "prompt", columns), where, "prompt")
        if not isinstance(prompt, str):
            _fail(where, "prompt", f"is a list of messages but {field!r} is a string; write both in the same form")
        return prompt, completion
    if isinstance(given, list):
        prompt = _text(given, where, "prompt")
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            _fail(where, "prompt", "ends with an assistant message; end it with what is to be answered")
        return prompt, completion
    if given is None and len(completion) == 1:
        _required(row, where, "prompt", columns)
    shared = completion[:-1]
    if not shared:
        whole = (
            "'chosen' and 'rejected' be whole conversations that share all but their last message"
            if field == "chosen"
            else f"{field!r} be the whole conversation"
        )
        _fail(where, "prompt", f"must be a list of messages, as {field!r} is; or leave it out and let {whole}")
    if given is not None and all(message["content"] != given for message in shared):
        _fail(
            where,
            "prompt",
            f"is {_shown(given)}, which is no message of the conversation in {field!r}; "
            "write it as a list of messages, or drop the column",
        )
    return shared, completion[-1:]


def _split_rejected(row: Mapping[str, Any], where: str, columns: Columns, rejected: Text, prompt: Text) -> Text:
    """Return the rejected completion, without the prompt that stood inside the chosen one."""
    if isinstance(rejected, str) or isinstance(row.get(columns.prompt), list):
        return rejected
    if rejected[:-1] != prompt:
        _fail(
            where,
            "rejected",
            "must share all but its last message with 'chosen' when the prompt stands inside them; "
            "or give the shared part as 'prompt' and one assistant message each as 'chosen' and 'rejected'",
        )
    return rejected[-1:]


def _check_completion(text: Text, where: str, field: str) -> None:
    if isinstance(text, list):
        if len(text) != 1 or text[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in text)
            _fail(where, field, f"must be one assistant message after the prompt, not messages by: {roles}")
        text = text[0]["content"]
    if not text.strip():
        _fail(where, field, "is empty; a completion needs at least one visible character, so drop or fill this row")


def _shown(value: Any, limit: int = 40) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"  # it may be too deep to be written out
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
