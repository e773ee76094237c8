"""Stored rows as pairs of distinct texts: what reward models and the estimate of users' codes are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_only

from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.rewards import JudgedPairs, TextTable
from prlhf_lightning.utils.hashing import content_key
from prlhf_lightning.utils.progress import tracked

_ROWS_AT_ONCE = 10_000
_WORTH_A_BAR = 500_000  # rows


def judged_pairs(rows: Pairs, nothing: Sequence[int] = ()) -> JudgedPairs:
    """Return rows as pairs of distinct texts; a thumb is a pair of its text and the threshold.

    Args:
        rows: N stored pairs or thumbs. A thumb has a completion on one of its sides.
        nothing: Token ids of prompt and completion of the threshold, a text without content.
    """
    numbers: dict[tuple[bytes, bytes], int] = {}
    threshold = (_raw(nothing), _raw(nothing))
    chosen, rejected = list[int](), list[int]()
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    show = len(rows) > _WORTH_A_BAR and getattr(rank_zero_only, "rank", 0) == 0
    for start in tracked(starts, "Reading what users judged", len(starts), show=show):
        positions = rows.positions[start : start + _ROWS_AT_ONCE]
        prompts, *sides = rows.split.ids(positions, ("prompt", "chosen", "rejected"))
        for completions, found in zip(sides, (chosen, rejected), strict=True):
            for prompt, completion in zip(prompts, completions, strict=True):
                text = (prompt, completion) if completion else threshold
                found.append(numbers.setdefault(text, len(numbers)))
    users = rows.split.users[rows.positions].tolist()
    user_ids = tuple(rows.split.user_ids[user] for user in users)
    first, second = (torch.tensor(side, dtype=torch.long) for side in (chosen, rejected))
    return JudgedPairs(user_ids, first, second, _table(numbers), numbers.get(threshold, -1))


def _table(texts: dict[tuple[bytes, bytes], int]) -> TextTable:
    key_of = cache(lambda raw: content_key(_ids(raw)))
    ids = cache(_ids)  # prompts repeat
    prompts, completions = tuple(ids(prompt) for prompt, _ in texts), tuple(_ids(text) for _, text in texts)
    keys = tuple(content_key(*parts) for parts in zip(prompts, completions, strict=True))
    return TextTable(prompts, completions, tuple(key_of(prompt) for prompt, _ in texts), keys)


def _raw(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _ids(raw: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(raw, np.int32).astype(np.int64)
