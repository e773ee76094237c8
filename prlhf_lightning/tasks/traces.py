"""Whether a file still holds something of a person: its bytes are searched, whatever format they are in."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEAST_BYTES = 8  # fewer occur in other numbers by chance


def id_bytes(user_id: str) -> bytes:
    """Return an id as it stands in a file."""
    return user_id.encode("utf-8", "surrogatepass")


def written_forms(user_id: str) -> list[bytes]:
    """Return an id as it stands in a file of any kind: as it is, and as CSV and JSON quote it."""
    as_json = (json.dumps(user_id, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys(map(id_bytes, (user_id, user_id.replace('"', '""'), *as_json))))


def vector_bytes(vectors: Iterable[Tensor], others: Iterable[Tensor]) -> list[bytes]:
    """Return the bytes of a person's vectors, but for those that tell nothing of the person.

    Args:
        vectors: The person's rows.
        others: For each, the table `[n, ...]` of those who stay: a row that equals one of these, as the generic user's
            does until it is trained, is theirs too.
    """
    own = [row for row, table in zip(vectors, others, strict=True) if not (table == row).flatten(1).all(1).any()]
    raw = [row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for row in own]
    return [part for part in raw if len(part) >= _LEAST_BYTES and any(part)]


def occurs(path: Path, patterns: Sequence[bytes]) -> list[bool]:
    """Return which of some byte strings a file holds."""
    if not path.stat().st_size:
        return [False] * len(patterns)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [content.find(pattern) >= 0 for pattern in patterns]


def texts(content: Any) -> Iterator[str]:
    """Yield every text in what a checkpoint holds, keys and settings included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from texts(key)
            yield from texts(value)
    elif isinstance(content, list | tuple | set | frozenset):
        for value in content:
            yield from texts(value)
    elif hasattr(content, "__dict__") and not isinstance(content, Tensor):
        yield from texts(vars(content))
