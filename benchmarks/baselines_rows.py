"""Rows for `baselines.py`: checked, without ties, and with what a prompt can say about a user in front of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from prlhf_lightning.data import FileSource
from prlhf_lightning.data.conversations import plain_text
from prlhf_lightning.data.records import FeedbackRecord, Text, TieError, parse_record
from prlhf_lightning.utils.io import atomic_write_bytes


def read_records(path: Path) -> list[FeedbackRecord]:
    """Return the pairs of a file in its order, without ties.

    Raises:
        FeedbackFormatError: A row is malformed.
    """
    records = []
    for where, row in FileSource(path).rows("train"):
        try:
            records.append(parse_record(row, where))
        except TieError:
            continue
    return records


def row_of(record: FeedbackRecord, preface: str = "") -> dict[str, Any]:
    """Return a record as a row of a file, with a preface in front of its prompt."""
    row = {"user_id": record.user_id, "prompt": _with_preface(record.prompt, preface)}
    row |= {"chosen": record.chosen, "rejected": record.rejected, "user_text": record.user_text, "tools": record.tools}
    return {name: value for name, value in row.items() if value is not None}


def id_prefaces(records: Iterable[FeedbackRecord]) -> list[str]:
    """Return for each record a line with its user's id."""
    return [f"The user is {record.user_id}.\n\n" for record in records]


def pair_prefaces(
    records: Sequence[FeedbackRecord], train: Sequence[FeedbackRecord], shown: int, characters: int, seed: int
) -> list[str]:
    """Return for each record a few training pairs of its user, as text.

    A pair that shares a response with the record is never shown: in training it would give the answer away, and teach
    the model to copy.

    Args:
        records: The records, of either split.
        train: The training records.
        shown: Most pairs in a preface; a user with fewer has a shorter preface.
        characters: Most characters of a text in a preface.
        seed: Seed of the choice of pairs.
    """
    own = defaultdict(list)
    for number, record in enumerate(train):
        own[record.user_id].append((number, _responses(record)))
    draw, prefaces = Random(seed), []
    for record in records:
        responses = _responses(record)
        others = [number for number, theirs in own[record.user_id] if not theirs & responses]
        drawn = [train[number] for number in draw.sample(others, min(shown, len(others)))]
        prefaces.append("".join(_told(pair, record, characters) for pair in drawn) + ("\n" if drawn else ""))
    return prefaces


def write_rows(path: Path, records: Sequence[FeedbackRecord], prefaces: Sequence[str] | None = None) -> None:
    """Write records as JSON Lines."""
    fronts = prefaces if prefaces is not None else [""] * len(records)
    rows = (json.dumps(row_of(*both), ensure_ascii=False) for both in zip(records, fronts, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, "".join(f"{row}\n" for row in rows).encode())


def _responses(record: FeedbackRecord) -> set[tuple[str, str]]:
    prompt = plain_text(record.prompt)
    return {(prompt, plain_text(record.chosen)), (prompt, plain_text(record.rejected))}


def _told(pair: FeedbackRecord, record: FeedbackRecord, characters: int) -> str:
    prompt, chosen, rejected = (
        " ".join(plain_text(text).split())[:characters] for text in (pair.prompt, pair.chosen, pair.rejected)
    )
    to = f' to "{prompt}"' if pair.prompt != record.prompt else ""
    return f"This user preferred{to}: {chosen}\nover: {rejected}\n"


def _with_preface(prompt: Text, preface: str) -> Text:
    if isinstance(prompt, str):
        return preface + prompt
    first = next((place for place, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": preface.strip()}, *prompt] if preface else prompt
    return [
        {**message, "content": preface + message["content"]} if place == first else message
        for place, message in enumerate(prompt)
    ]
