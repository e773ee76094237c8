"""The distinct texts that users judged, and each judgment: what a model of users alone needs from the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.utils.progress import tracked

_ROWS_AT_ONCE = 10_000
_WORTH_A_BAR = 500_000  # rows


@dataclass(frozen=True)
class JudgedTexts:
    """V judgments of M distinct texts; a text is a completion of a prompt.

    Attributes:
        rows: `[V]` int64 row of each judgment's user in the vocabulary.
        texts: `[V]` int64 text.
        values: `[V]` float32, 1 for a chosen or liked completion, -1 for a rejected or disliked one.
        ids: `[S]` int64 token ids of all completions, one text after the other.
        lengths: `[M]` int64 number of tokens of each text.
    """

    rows: Tensor
    texts: Tensor
    values: Tensor
    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, pairs: Pairs, vocabulary: UserVocabulary, show_progress: bool = True) -> JudgedTexts:
        """Return the judgments of known users.

        Args:
            pairs: Stored rows.
            vocabulary: The known users.
            show_progress: Whether to show a progress bar for many rows.
        """
        row_of = vocabulary.rows(pairs.split.user_ids).numpy()
        users = row_of[pairs.split.users[pairs.positions]]
        numbers: dict[tuple[bytes, bytes], int] = {}
        contents: list[bytes] = []
        texts, values, rows = list[int](), list[float](), list[int]()
        starts = range(0, len(pairs), _ROWS_AT_ONCE)
        show = show_progress and len(pairs) > _WORTH_A_BAR
        for start in tracked(starts, "Reading what users judged", len(starts), show=show):
            positions = pairs.positions[start : start + _ROWS_AT_ONCE]
            prompts, chosen, rejected = pairs.split.ids(positions, ("prompt", "chosen", "rejected"))
            for value, completions in ((1.0, chosen), (-1.0, rejected)):
                for row, prompt, completion in zip(users[start:], prompts, completions, strict=False):
                    if completion and row:  # a thumbs-up has no rejected completion
                        number = numbers.setdefault((prompt, completion), len(contents))
                        if number == len(contents):
                            contents.append(completion)
                        texts.append(number)
                        values.append(value)
                        rows.append(row)
        lengths = torch.tensor([len(content) for content in contents], dtype=torch.long) // np.dtype(np.int32).itemsize
        ids = torch.from_numpy(np.frombuffer(b"".join(contents), np.int32).astype(np.int64))
        rows_of, texts_of = (torch.tensor(numbers, dtype=torch.long) for numbers in (rows, texts))
        return cls(rows_of, texts_of, torch.tensor(values), ids, lengths)
