"""Whether a file still holds something of a person: its bytes are searched, whatever format they are in."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import torch
from torch import Tensor

from prlhf_lightning.checkpoint_entry import KEY

#: The keys that lead to a text in a checkpoint, from the outermost.
Place: TypeAlias = tuple[str, ...]

_LEAST_BYTES = 8  # fewer occur in other numbers by chance
# Parts that Lightning writes: names of weights, counts and settings.
_WITHOUT_USERS = {"state_dict", "loops", "optimizer_states", "lr_schedulers"}
_WITHOUT_USERS |= {"hparams_name", "hparams_type", "hyper_parameters", "datamodule_hyper_parameters"}
_WITHOUT_USERS |= {"pytorch-lightning_version", "native_amp_scaling_state", "MixedPrecision"}
# Callbacks of this package that keep something in checkpoints.
_CALLBACKS = {"BestAndLast", "CollapseMonitor"}


def id_bytes(user_id: str) -> bytes:
    """Return an id as it stands in a file."""
    return user_id.encode("utf-8", "surrogatepass")


def written_forms(user_id: str) -> list[bytes]:
    """Return an id as it stands in a file of any kind: as it is, and as CSV and JSON quote it."""
    as_json = (json.dumps(user_id, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys(map(id_bytes, (user_id, user_id.replace('"', '""'), *as_json))))


def path_forms(user_id: str) -> list[str]:
    """Return an id as it may stand in the name of a file or folder: as it is, and percent-encoded."""
    encoded = quote(user_id, safe="", errors="surrogatepass")
    return list(dict.fromkeys((user_id, encoded, encoded.replace(".", "%2E"))))


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


def texts(content: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield every text in what a checkpoint holds, keys and settings included, each with the keys that lead to it."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            below = (*place, str(key))
            yield from texts(key, below)
            yield from texts(value, below)
    elif isinstance(content, list | tuple | set | frozenset):
        for number, value in enumerate(content):
            yield from texts(value, (*place, str(number)))
    elif hasattr(content, "__dict__") and not isinstance(content, Tensor):
        yield from texts(vars(content), place)


def is_of_no_user(place: Place) -> bool:
    """Return whether what stands at a place of a checkpoint is a name or a setting, the same whoever the users are.

    So are the names of the checkpoint's parts, and what Lightning and this package keep in them, but for the list of
    users. A part that is not known may hold anything, as may the state of a callback of somebody else.
    """
    part, *below = place
    if not below or part in _WITHOUT_USERS:
        return True
    if part == "callbacks":
        from lightning.pytorch import callbacks  # here, since it takes seconds that `--help` should not

        name = re.match(r"\w*", below[0])[0]  # type: ignore[index]  # it matches always
        return name in _CALLBACKS or hasattr(callbacks, name)
    return part == KEY and (below == ["users"] or below[0] != "users")
