"""What a checkpoint holds of people: their vectors, as bytes, and the texts in it, with where they stand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prlhf_lightning.checkpoint_entry import KEY

#: The keys that lead to a text in a checkpoint, from the outermost.
Place: TypeAlias = tuple[str, ...]

_LEAST_BYTES = 8  # fewer occur in other numbers by chance
_ROWS = 4096  # of a table, in memory at once
# Parts that Lightning writes: names of weights, counts and settings.
_WITHOUT_USERS = {"state_dict", "loops", "optimizer_states", "lr_schedulers"}
_WITHOUT_USERS |= {"hparams_name", "hparams_type", "hyper_parameters", "datamodule_hyper_parameters"}
_WITHOUT_USERS |= {"pytorch-lightning_version", "native_amp_scaling_state", "MixedPrecision"}
# Callbacks of this package that keep something in checkpoints.
_CALLBACKS = {"BestAndLast", "CollapseMonitor"}


class Vectors:
    """The vectors of people who are erased, but for those that tell nothing of a person.

    A row that equals one of somebody who stays, as the generic user's does until it is trained, is theirs too; nor does
    a row of zeros tell anything, or one of fewer than 8 bytes.

    Args:
        tables: What is kept of all users, each `[rows, ...]`.
        rows: Those of the people.
        stay: For each of the first tables, one more row that stays.
    """

    def __init__(self, tables: Sequence[Tensor], rows: Sequence[int], stay: Sequence[Tensor] = ()) -> None:
        self._rows_of: dict[bytes, set[int]] = {}
        for number, table in enumerate(tables):
            gone = torch.zeros(len(table), dtype=torch.bool)
            gone[list(rows)] = True
            own: dict[bytes, set[int]] = {}
            for row, raw in zip(rows, _raw_rows(table[list(rows)]), strict=True):
                own.setdefault(raw, set()).add(row)
            for start in range(0, len(table), _ROWS):
                some = table[start : start + _ROWS]
                for raw in _raw_rows(some[~gone[start : start + len(some)]]):
                    own.pop(raw, None)
            for new in stay[number : number + 1]:
                own.pop(next(_raw_rows(new[None].to(table.dtype))), None)
            for raw, whose in own.items():
                if len(raw) >= _LEAST_BYTES and any(raw):
                    self._rows_of.setdefault(raw, set()).update(whose)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows_of)

    def count(self, row: int) -> int:
        """Return how many vectors there are of one person."""
        return self._counts[row]

    def whose(self, raw: Iterable[bytes]) -> set[int]:
        """Return the rows that some of the vectors are of."""
        return {row for one in raw for row in self._rows_of.get(one, ())}

    @cached_property
    def _counts(self) -> Counter[int]:
        return Counter(row for whose in self._rows_of.values() for row in whose)


def _raw_rows(table: Tensor) -> Iterator[bytes]:
    rows = table.reshape(len(table), -1).contiguous()
    if rows.numel():
        raw = rows.view(torch.uint8).numpy()
        yield from (row.tobytes() for row in raw)
    else:
        yield from (b"" for _ in range(len(table)))


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
