"""Pairs as indices into their distinct texts, so that each text is embedded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prlhf_lightning.utils.hashing import content_key


@dataclass(frozen=True)
class TextTable:
    """T distinct texts, each a prompt and a completion as token ids.

    Attributes:
        prompts: T prompts.
        completions: T completions.
        prompt_keys: T 16-byte keys of the prompts.
        keys: T 16-byte keys of prompt and completion together.
    """

    prompts: tuple[npt.NDArray[np.int64], ...]
    completions: tuple[npt.NDArray[np.int64], ...]
    prompt_keys: tuple[bytes, ...]
    keys: tuple[bytes, ...]

    def __len__(self) -> int:
        """Return the number of texts, T."""
        return len(self.keys)

    def select(self, numbers: Sequence[int]) -> TextTable:
        """Return the texts with these numbers."""
        columns = (self.prompts, self.completions, self.prompt_keys, self.keys)
        return TextTable(*(tuple(column[number] for number in numbers) for column in columns))  # type: ignore[arg-type]

    @classmethod
    def of(cls, texts: Iterable[tuple[Any, Any]]) -> tuple[TextTable, Tensor]:
        """Return the distinct texts among prompts and completions, and the index of each given text, `[n]` int64."""
        number: dict[bytes, int] = {}
        prompts, completions, prompt_keys, index = [], [], [], []
        for prompt, completion in texts:
            ids = np.asarray(prompt, dtype=np.int64), np.asarray(completion, dtype=np.int64)
            key = content_key(*ids)
            if key not in number:
                number[key] = len(number)
                prompts.append(ids[0])
                completions.append(ids[1])
                prompt_keys.append(content_key(ids[0]))
            index.append(number[key])
        table = cls(tuple(prompts), tuple(completions), tuple(prompt_keys), tuple(number))
        return table, torch.tensor(index, dtype=torch.long)


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs of texts, each with the user who judged it.

    A thumb is a pair too: of the text and the threshold above which this user likes a text. The threshold is the reward
    of one more text, which has no content and which all users share.

    Attributes:
        user_ids: N ids.
        chosen: `[N]` int64 index of the preferred text.
        rejected: `[N]` int64 index of the other one.
        texts: The distinct texts.
        threshold: Index of the text that is the threshold; -1 if there are no thumbs.
    """

    user_ids: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor
    texts: TextTable
    threshold: int = -1

    def __len__(self) -> int:
        """Return the number of pairs, N."""
        return len(self.user_ids)

    def select(self, rows: Tensor) -> JudgedPairs:
        """Return the pairs `rows` `[n]`, and only the texts that stand in them."""
        sides = torch.stack([self.chosen[rows], self.rejected[rows]])
        used, (chosen, rejected) = torch.unique(sides, return_inverse=True)
        threshold = (used == self.threshold).nonzero().flatten().tolist() or [-1]
        texts = self.texts.select(used.tolist())
        return JudgedPairs(tuple(self.user_ids[row] for row in rows.tolist()), chosen, rejected, texts, threshold[0])

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> JudgedPairs:
        """Return the pairs of tokenized rows with `user_id`, `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        user_ids: list[str] = []

        def texts() -> Iterable[tuple[Any, Any]]:
            for row in rows:
                user_ids.append(row["user_id"])
                yield row["prompt_ids"], row["chosen_ids"]
                yield row["prompt_ids"], row["rejected_ids"]

        table, index = TextTable.of(texts())
        return cls(tuple(user_ids), index[0::2], index[1::2], table)
