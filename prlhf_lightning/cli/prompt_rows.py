"""Users and prompts to sample answers for, from a file or from the training rows of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from prlhf_lightning.analysis.judges import Person, Vote
from prlhf_lightning.data import DataSource, PreferenceDataModule
from prlhf_lightning.data.conversations import fail, read_text, read_tools
from prlhf_lightning.data.records import Columns, FeedbackRecord, Text, TieError, parse_record, parse_user_id
from prlhf_lightning.data.sources.base import read
from prlhf_lightning.inference.best_of import hashed_seed
from prlhf_lightning.utils.progress import counted

_VOTES = 8  # of a user that a judge is told
_READING = "Reading users and prompts"


@dataclass(frozen=True)
class PromptRow:
    """A user and a prompt.

    Attributes:
        user_id: The user.
        prompt: The prompt.
        user_text: Text about the user, or None.
        tools: Tools of the assistant, or None.
    """

    user_id: str
    prompt: Text
    user_text: str | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        """A hash of the content."""
        content = json.dumps([self.user_id, self.prompt, self.user_text, self.tools], sort_keys=True)
        return blake2b(content.encode(), digest_size=16).hexdigest()


def rows_of_file(source: DataSource) -> Iterator[PromptRow]:
    """Yield the users and prompts of a source's rows; further columns are ignored.

    Raises:
        FeedbackFormatError: A row is malformed; the message names the place, the field and the fix.
    """
    columns = Columns.from_mapping(source.columns)
    for where, row in counted(read(source, "train"), _READING):
        user_id = parse_user_id(row, where, columns)
        prompt, text = row.get(columns.prompt), row.get(columns.user_text)
        if not isinstance(prompt, str | list):
            fix = "write a list of messages with 'role' and 'content', or a string"
            fail(where, "prompt", "must be a string, or a list of messages", fix)
        if not isinstance(text, str | None):
            fail(where, "user_text", "must be a string", "put it in quotes, or leave it out")
        tools = read_tools(row.get(columns.tools), where)
        yield PromptRow(user_id, read_text(prompt, where, "prompt"), text or None, tools)


def rows_of_training(data: PreferenceDataModule) -> Iterator[PromptRow]:
    """Yield the users and prompts of the rows that training uses."""
    for record in _training_records(data):
        yield PromptRow(record.user_id, record.prompt, record.user_text, record.tools)


def people_of(data: PreferenceDataModule) -> dict[str, Person]:
    """Return what a judge may know about users, by id: their text and some of their training votes."""
    people: dict[str, Person] = {}
    for record in _training_records(data):
        person = people.get(record.user_id) or Person(record.user_id, record.user_text or "")
        if record.chosen and record.rejected and len(person.votes) < _VOTES:
            vote = Vote(record.prompt, record.chosen, record.rejected)
            person = replace(person, votes=(*person.votes, vote))
        people[record.user_id] = person
    return people


def distinct(found: Iterable[PromptRow], per_user: int | None, seed: int, counts: Counter[str]) -> dict[str, PromptRow]:
    """Return distinct rows by key, in order.

    Args:
        found: The rows.
        per_user: Maximum number of rows of a user, drawn by a hash of seed and row; None for all.
        seed: The seed.
        counts: Gets the number of repeated rows.
    """
    rows: dict[str, PromptRow] = {}
    for row in found:
        key = row.key
        if key in rows:
            counts["rows repeat a user and a prompt, and were left out"] += 1
        rows.setdefault(key, row)
    if per_user is None:
        return rows
    kept: set[str] = set()
    taken: Counter[str] = Counter()
    for key in sorted(rows, key=lambda key: hashed_seed(seed, key)):
        if taken[rows[key].user_id] < per_user:
            taken[rows[key].user_id] += 1
            kept.add(key)
    return {key: row for key, row in rows.items() if key in kept}


def _training_records(data: PreferenceDataModule) -> Iterator[FeedbackRecord]:
    """Yield the training rows, with users' ids as in training, without ties and rows held out for validation."""
    held_out: set[str] = set()
    if "validation" not in data.source.splits():
        for name in ("seen", "unseen"):
            if pairs := data.evaluation_pairs(name):
                held_out.update(str(row["where"]) for row in pairs.__getitems__(list(range(len(pairs)))))
    columns = Columns.from_mapping(data.source.columns)
    for where, row in counted(read(data.source, "train"), _READING):
        if str(where) in held_out:
            continue
        try:
            record = parse_record(row, where, columns, data.feedback)
        except TieError:
            continue
        yield replace(record, user_id=data.known_as(record.user_id))
