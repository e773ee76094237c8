"""Validation of one row of feedback: a raw mapping in, a `FeedbackRecord` or an error with the fix out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from prlhf_lightning.data.columns import (
    all_missing,
    column_advice,
    only_turns,
    similar_columns,
    winner_is_named,
    winner_of,
)
from prlhf_lightning.data.conversations import Message as Message
from prlhf_lightning.data.conversations import (
    Note,
    check_characters,
    fail,
    implicit_prompt,
    is_blank,
    read_text,
    read_tools,
    without_prompt,
)
from prlhf_lightning.data.conversations import Text as Text
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.types import Feedback


@dataclass(frozen=True)
class Columns:
    """Column name of each field.

    Pairs have `chosen` and `rejected`, or `response_a`, `response_b` and `winner`. A `system` message is read from a
    column only if that column is named.
    """

    user_id: str = "user_id"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    user_text: str = "user_text"
    tools: str = "tools"
    system: str = ""
    response_a: str = "response_a"
    response_b: str = "response_b"
    winner: str = "winner"

    def named(self) -> set[str]:
        """Return the names of all columns."""
        return {getattr(self, field.name) for field in fields(self)} - {""}

    @classmethod
    def from_mapping(cls, columns: Mapping[str, str]) -> Columns:
        """Build from entries that differ from the defaults.

        Raises:
            ConfigurationError: A field does not exist.
        """
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
    """One judgment of one user.

    Attributes:
        user_id: The user's id.
        prompt: The prompt: a string, or the conversation so far.
        chosen: The preferred completion: a string, or a list of one assistant message. None for a thumbs-down.
        rejected: The other completion; None in demonstrations, and for a thumbs-up.
        user_text: Text about the user, or None.
        thumb: Whether the row is unpaired feedback: one completion and a label.
        tools: Tool definitions for the chat template, or None.
        notes: Remarks on the row, reported with the number of such rows.
    """

    user_id: str
    prompt: Text
    chosen: Text | None
    rejected: Text | None = None
    user_text: str | None = None
    thumb: bool = False
    tools: list[dict[str, Any]] | None = None
    notes: tuple[Note, ...] = ()

    @property
    def fields(self) -> tuple[str, str]:
        """Names, for messages, of the fields of `chosen` and `rejected` in the row."""
        return ("completion", "completion") if self.thumb else ("chosen", "rejected")


_UP = "true 1 1.0 +1 up thumbs_up thumbsup thumb_up like liked good yes positive upvote desirable accepted 👍"
_DOWN = (
    "false 0 0.0 -1 -1.0 down thumbs_down thumbsdown thumb_down dislike disliked bad no negative downvote undesirable "
)
_DOWN += "rejected 👎"
_LABELS = {**dict.fromkeys(_UP.split(), True), **dict.fromkeys(_DOWN.split(), False)}


class TieError(FeedbackFormatError):
    """The two completions of a row are equal, or neither won."""


_DEFAULT_COLUMNS = Columns()


def parse_record(
    row: Mapping[str, Any], where: str, columns: Columns = _DEFAULT_COLUMNS, feedback: Feedback = "pairs"
) -> FeedbackRecord:
    """Validate one raw row.

    Texts are strings or conversations, in any form that `read_text` accepts. Conversational rows may omit `prompt`: the
    prompt is then the messages shared by `chosen` and `rejected` (or all but the last of `completion`), and the last
    message of each is the completion. In plain rows without `prompt`, the prompt is the common start of both answers
    (see `implicit_prompt`). Other columns are ignored.

    Args:
        row: Column name to value.
        where: Location of the row, such as `votes.jsonl:17`; every message starts with it.
        columns: Column name of each field.
        feedback: Kind of row: `pairs` have `chosen` and `rejected` (or two responses and a winner); `thumbs` have
            `completion` and `label`, and give a record with one completion; `demonstrations` have `chosen`, and may
            have `rejected`.

    Raises:
        FeedbackFormatError: The row is malformed; the message names the location, the field and the fix.
        TieError: The row is well formed, but both completions are equal, or neither won.
    """
    tie = None
    if feedback != "thumbs":
        row, tie = _with_winner(row, where, columns)
    _refuse_missing(row, where, columns, feedback)
    user_id = parse_user_id(row, where, columns)
    if feedback == "thumbs":
        return _parse_thumb(user_id, row, where, columns)
    chosen = read_text(_required(row, where, "chosen", columns), where, "chosen")
    rejected: Text | None = None
    if feedback == "pairs" or row.get(columns.rejected):
        rejected = read_text(_required(row, where, "rejected", columns), where, "rejected")
        if isinstance(rejected, str) != isinstance(chosen, str):
            problem = "and 'chosen' must both be strings or both be lists of messages"
            fail(where, "rejected", problem, "write both in one way")
    prompt, completions, notes = _split_prompt(row, where, columns, {"chosen": chosen, "rejected": rejected})
    for field, completion in completions.items():
        _check_completion(completion, where, field)
    if tie is not None:
        raise TieError(
            f"is a tie (column {tie!r}), so the row says nothing about what the user prefers",
            "drop the row, or set ties: drop to leave such rows out",
            field="winner",
            where=where,
            kind="is a tie",
        )
    if completions.get("rejected") == completions["chosen"]:
        raise TieError(
            "equals 'rejected', so the row says nothing about what the user prefers",
            "drop the row, or set ties: drop to leave such rows out",
            field="chosen",
            where=where,
            kind="equals 'rejected'",
        )
    return FeedbackRecord(
        user_id,
        prompt,
        completions["chosen"],
        completions.get("rejected"),
        _user_text(row, where, columns),
        tools=read_tools(row.get(columns.tools), where),
        notes=tuple(notes),
    )


def _parse_thumb(user_id: str, row: Mapping[str, Any], where: str, columns: Columns) -> FeedbackRecord:
    completion = read_text(_required(row, where, "completion", columns), where, "completion")
    prompt, completions, notes = _split_prompt(row, where, columns, {"completion": completion})
    completion = completions["completion"]
    _check_completion(completion, where, "completion")
    value = _required(row, where, "label", columns)
    # CSV has only text, and many tables use 1 and 0 for true and false.
    up = None
    if isinstance(value, str | int | float):
        up = _LABELS.get("_".join(str(value).strip().lower().split()))
    if up is None:
        fail(
            where,
            "label",
            f"is {_shown(value)}, of type {type(value).__name__}",
            "write true (or 1) for a thumbs-up and false (or 0) for a thumbs-down; for stars or other labels, read the "
            "rows with LabelSource",
            "is neither up nor down",
        )
    chosen, rejected = (completion, None) if up else (None, completion)
    tools = read_tools(row.get(columns.tools), where)
    text = _user_text(row, where, columns)
    return FeedbackRecord(user_id, prompt, chosen, rejected, text, True, tools, tuple(notes))


def _with_winner(row: Mapping[str, Any], where: str, columns: Columns) -> tuple[Mapping[str, Any], str | None]:
    """Convert two responses and a winner to chosen and rejected; also return the winner's column if it is a tie."""
    names = (columns.response_a, columns.response_b)
    if columns.rejected in row or any(name not in row for name in names):
        return row, None
    won = winner_of(row, where, columns.winner, names)
    if won is None:
        return row, None
    place, column = won
    prompt, responses = only_turns(row.get(columns.prompt), [row[name] for name in names], where)
    chosen, rejected = reversed(responses) if place == 1 else responses
    pair = {columns.chosen: chosen, columns.rejected: rejected}
    if columns.prompt in row:
        pair[columns.prompt] = prompt
    return {**row, **pair}, column if place is None else None


_NEEDED: dict[str, tuple[str, ...]] = {
    "pairs": ("user_id", "chosen", "rejected"),
    "thumbs": ("user_id", "completion", "label"),
    "demonstrations": ("user_id", "chosen"),
}


def _refuse_missing(row: Mapping[str, Any], where: str, columns: Columns, feedback: Feedback) -> None:
    """Reject a row that lacks several columns, with all of them in one message."""
    needed = _NEEDED[feedback]
    if all([getattr(columns, field) in row for field in needed]):
        return
    by_winner = feedback == "pairs" and _is_by_winner(row, columns)
    if by_winner:
        named = winner_is_named(row, columns.winner)
        needed = ("user_id", "response_a", "response_b", *(() if named else ("winner",)))
    missing = [field for field in needed if getattr(columns, field) not in row]
    # The prompt may be inside the responses, or inside chosen and rejected.
    inside = by_winner or any(isinstance(value, list) or str(value).startswith("[{") for value in row.values())
    taken = {similar_columns(field, getattr(columns, field), list(row)) for field in missing}
    others = [column for column in row if column not in taken]
    if (
        columns.prompt not in row
        and not by_winner
        and (not inside or similar_columns("prompt", columns.prompt, others))
    ):
        missing.append("prompt")
    if missing == ["winner"]:
        _required(row, where, "winner", columns)
    if len(missing) > 1 and all(_other_kind(row, field, columns) is None for field in missing):
        raise all_missing(where, {field: getattr(columns, field) for field in missing}, list(row))


def _is_by_winner(row: Mapping[str, Any], columns: Columns) -> bool:
    """Return whether an incomplete row is meant to have two responses and a winner."""
    if columns.chosen in row and columns.rejected in row:
        return False
    responses = columns.response_a in row and columns.response_b in row
    return responses or (columns.chosen not in row and winner_is_named(row, columns.winner))


def parse_user_id(row: Mapping[str, Any], where: str, columns: Columns = _DEFAULT_COLUMNS) -> str:
    """Return the id of the user of a raw row, or raise a `FeedbackFormatError`; see `parse_record`."""
    user_id: Any = _required(row, where, "user_id", columns)
    if not isinstance(user_id, str):
        fail(
            where,
            "user_id",
            f"is of type {type(user_id).__name__}",
            "write it as a string (in files, whole numbers are read as strings; pandas makes numbers like 7.0 of a "
            "column with gaps: fill or drop these rows first)",
        )
    check_characters(user_id, where, "user_id")
    if not user_id.strip():
        fail(where, "user_id", "is empty", "every row needs the id of the person who judged, so drop or fill this row")
    return user_id


def spell_user_id(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """Return a raw row with an integer id, as in databases, converted to a string: `7` to `"7"`.

    Different ids stay different. Sources convert ids before any other step, so pseudonyms, counts and messages use the
    string. Validation rejects other types.
    """
    user_id = row.get(column)
    return {**row, column: str(user_id)} if type(user_id) is int else row  # bool is not an id


def _required(row: Mapping[str, Any], where: str, field: str, columns: Columns) -> Any:
    """Return the value of a field, or raise an error that says how to map or fill its column."""
    column = getattr(columns, field)
    value = row.get(column)
    if value is not None:
        return value
    if column in row:
        fail(where, field, f"is null (column {column!r})", "fill it or drop the row", "is null")
    if (other := _other_kind(row, field, columns)) is not None:
        what, fix = other
        fail(where, field, f"is missing: {what}", fix)
    fail(
        where,
        field,
        f"is missing: there is no column {column!r} among {', '.join(repr(str(name)) for name in row)}",
        column_advice(field, column, list(row)),
        "is missing",
    )


def _other_kind(row: Mapping[str, Any], field: str, columns: Columns) -> tuple[str, str] | None:
    """Return the problem and the fix for a row that is another kind of feedback; otherwise None."""
    if field in ("chosen", "rejected") and columns.completion in row and columns.label in row:
        return (
            "the row is a thumb up or down, where a pair is needed",
            "to train on thumbs, take a loss such as KTOLoss",
        )
    if field in ("completion", "label") and columns.chosen in row and columns.rejected in row:
        return (
            "the row is a pair, which another loss takes, such as DPOLoss",
            "or write it as two rows, each with one completion and a label",
        )
    return None


def _user_text(row: Mapping[str, Any], where: str, columns: Columns) -> str | None:
    """Return the text about the user; it may be missing unless its column is named explicitly."""
    value = row.get(columns.user_text)
    if value is None:
        if columns.user_text != _DEFAULT_COLUMNS.user_text and columns.user_text not in row:
            _required(row, where, "user_text", columns)
        return None
    if not isinstance(value, str):
        fail(where, "user_text", f"is of type {type(value).__name__}", "write a string, or null where there is none")
    check_characters(value, where, "user_text")
    return value if value.strip() else None


def _split_prompt(
    row: Mapping[str, Any], where: str, columns: Columns, answers: Mapping[str, Text | None]
) -> tuple[Text, dict[str, Text], list[Note]]:
    """Return the prompt, the completions without it, and remarks.

    A prompt may be in its own column, inside the answers, or in both.
    """
    given = {field: answer for field, answer in answers.items() if answer is not None}
    raw = row.get(columns.prompt)
    prompt = None if raw is None else read_text(raw, where, "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        fail(where, "prompt", "ends with an assistant message", "end it with what is to be answered")
    texts = {field: answer for field, answer in given.items() if isinstance(answer, str)}
    notes: list[Note] = []
    if texts:
        if prompt is None:
            prompt, texts, notes = _without_shared_start(row, where, columns, texts)
        elif isinstance(prompt, str):
            texts, notes = without_prompt(prompt, texts)
        system = _system(row, where, columns)
        if isinstance(prompt, str) and system is None and read_tools(row.get(columns.tools), where) is None:
            return prompt, dict(texts), notes
        # A system message or tools need the chat template, so the row becomes a conversation.
        given = {field: [{"role": "assistant", "content": answer}] for field, answer in texts.items()}
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    conversations = {field: answer for field, answer in given.items() if isinstance(answer, list)}
    prompt, completions = _split_conversations(row, where, columns, prompt, conversations)
    if not notes and all(len(answer) == 1 for answer in completions.values()):
        contents = {field: answer[0]["content"] or "" for field, answer in completions.items()}
        contents, notes = without_prompt(prompt[-1]["content"] or "", contents)
        for field, text in contents.items():
            if completions[field][0]["content"]:  # null is allowed next to tool calls
                completions[field] = [{**completions[field][0], "content": text}]
    return _with_system(prompt, row, where, columns), dict(completions), notes


def _without_shared_start(
    row: Mapping[str, Any], where: str, columns: Columns, answers: dict[str, str]
) -> tuple[str, dict[str, str], list[Note]]:
    """Return the common start of plain answers as the prompt, the answers without it, and remarks."""
    values = list(answers.values())
    may_be_there = columns.prompt in row or similar_columns("prompt", columns.prompt, list(row)) is not None
    found = None if may_be_there else implicit_prompt(values[0], values[1] if len(values) > 1 else None)
    prompt, notes = found or _required(row, where, "prompt", columns)  # raises an error with the fix
    return prompt, {field: answer[len(prompt) :] for field, answer in answers.items()}, notes


def _split_conversations(
    row: Mapping[str, Any],
    where: str,
    columns: Columns,
    prompt: Text | None,
    answers: dict[str, list[Message]],
) -> tuple[list[Message], dict[str, list[Message]]]:
    """Return prompt and completions of a conversational row."""
    if isinstance(prompt, list):
        start = len(prompt)
        if all(len(answer) > start and answer[:start] == prompt for answer in answers.values()):
            return prompt, {field: answer[start:] for field, answer in answers.items()}
        return prompt, answers
    field, first = next(iter(answers.items()))
    if len(first) == 1:
        if prompt is None:
            _required(row, where, "prompt", columns)
        return [{"role": "user", "content": prompt}], answers
    shared = first[:-1]
    if prompt is not None and all((message["content"] or "").strip() != prompt.strip() for message in shared):
        fail(
            where,
            "prompt",
            f"is {_shown(prompt)}, which is no message of the conversation in {field!r}",
            "write it as a list of messages, or drop the column",
            f"is no message of the conversation in {field!r}",
        )
    if any(answer[:-1] != shared for answer in answers.values()):
        fail(
            where,
            "rejected",
            "must share all but its last message with 'chosen' when the prompt stands inside them",
            "or give the shared part as 'prompt' and one assistant message each as 'chosen' and 'rejected'",
        )
    return shared, {field: answer[-1:] for field, answer in answers.items()}


def _system(row: Mapping[str, Any], where: str, columns: Columns) -> str | None:
    """Return the value of the system column; None if no such column is named."""
    if not columns.system:
        return None
    if columns.system not in row:
        _required(row, where, "system", columns)
    value = row[columns.system]
    if value is not None and not isinstance(value, str):
        fail(where, "system", f"is of type {type(value).__name__}", "write a string, or null where there is none")
    return value if value and value.strip() else None


def _with_system(prompt: list[Message], row: Mapping[str, Any], where: str, columns: Columns) -> list[Message]:
    """Return a conversation with the system column's message, if any, at its start."""
    text = _system(row, where, columns)
    if text is None:
        return prompt
    check_characters(text, where, "system")
    if prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"] == text:
            return prompt
        fail(
            where, "system", "stands in its own column, and the conversation begins with another", "remove one of them"
        )
    return [{"role": "system", "content": text}, *prompt]


def _check_completion(text: Text, where: str, field: str) -> None:
    if isinstance(text, list):
        if len(text) != 1 or text[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in text)
            kind = "must be one assistant message after the prompt"
            fail(where, field, f"{kind}, not messages by: {roles}", "keep the answer alone", kind)
        blank = is_blank(text[0])
    else:
        blank = not text.strip()
    if blank:
        fail(where, field, "is empty", "a completion needs at least one visible character, so drop or fill this row")


def _shown(value: Any, limit: int = 40) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"  # it may be nested too deeply to print
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
