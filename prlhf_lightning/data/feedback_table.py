"""Feedback as numbers: who preferred which response to which, and how long each is. No text is kept."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.conversations import plain_text
from prlhf_lightning.data.progress import counted
from prlhf_lightning.data.records import Columns, Text, TieError, parse_record
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.surface import SURFACE_FEATURES, count_words, surface_features

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeedbackTable:
    """N rows by U users on I items (responses to prompts) to P prompts; the rows of the splits follow one another.

    Attributes:
        users: `[N]` index of the user of each row.
        chosen: `[N]` index of the chosen item.
        rejected: `[N]` index of the rejected one.
        rows: Number of rows of each split, in the order in which they stand.
        ties: Rows of each split that were left out, as both completions are the same.
        prompts: `[I]` index of the prompt of each item.
        prompt_words: `[P]` words of each prompt.
        words: `[I]` words of each response.
        characters: `[I]` characters of each response.
        features: `[I, F]` float64, `SURFACE_FEATURES` of each response.
        user_ids: The U users, by index.
    """

    users: _Indices
    chosen: _Indices
    rejected: _Indices
    rows: dict[Split, int]
    ties: dict[Split, int]
    prompts: _Indices
    prompt_words: _Indices
    words: _Indices
    characters: _Indices
    features: npt.NDArray[np.float64]
    user_ids: tuple[str, ...]

    @property
    def num_users(self) -> int:
        """Number U of users."""
        return len(self.user_ids)

    def of(self, split: Split) -> slice:
        """Return where the rows of a split stand; nowhere if there are none."""
        names = list(self.rows)
        start = sum(self.rows[name] for name in names[: names.index(split)]) if split in names else 0
        return slice(start, start + self.rows.get(split, 0))


def read_table(source: DataSource, splits: Iterable[Split]) -> FeedbackTable:
    """Read the rows of some splits of a source.

    Raises:
        FeedbackFormatError: A row is not what it should be; the message names the place, the field and the fix.
    """
    columns = Columns.from_mapping(source.columns)
    users: dict[str, int] = {}
    prompts: dict[bytes, int] = {}
    items: dict[bytes, int] = {}
    prompt_words, item_prompts, characters = array("q"), array("q"), array("q")
    features = array("d")
    rows, ties = {}, {}
    votes = array("q")

    def item(prompt: str, prompt_key: bytes, response: Text) -> int:
        text = plain_text(response)
        key = _key(prompt_key, text)
        if key not in items:
            items[key] = len(items)
            item_prompts.append(prompts[prompt_key])
            characters.append(len(text))
            features.extend(surface_features(prompt, text))
        return items[key]

    for split in splits:
        before, ties[split] = len(votes), 0
        for where, row in counted(source.rows(split), f"Reading {split}"):
            try:
                record = parse_record(row, where, columns)
            except TieError:
                ties[split] += 1
                continue
            prompt = plain_text(record.prompt)
            prompt_key = _key(b"", prompt)
            if prompt_key not in prompts:
                prompts[prompt_key] = len(prompts)
                prompt_words.append(count_words(prompt))
            votes.append(users.setdefault(record.user_id, len(users)))
            # Pairs have both; only records of other kinds of feedback may lack one.
            votes.extend(item(prompt, prompt_key, text) for text in (record.chosen or "", record.rejected or ""))
        rows[split] = (len(votes) - before) // 3
    by_user, chosen, rejected = np.array(votes, dtype=np.int64).reshape(-1, 3).T.copy()
    by_item = np.array(features, dtype=np.float64).reshape(-1, len(SURFACE_FEATURES))
    return FeedbackTable(
        users=by_user,
        chosen=chosen,
        rejected=rejected,
        rows=rows,
        ties=ties,
        prompts=np.array(item_prompts, dtype=np.int64),
        prompt_words=np.array(prompt_words, dtype=np.int64),
        words=np.rint(np.expm1(by_item[:, 0])).astype(np.int64),
        characters=np.array(characters, dtype=np.int64),
        features=by_item,
        user_ids=tuple(users),
    )


def _key(prefix: bytes, text: str) -> bytes:
    return blake2b(prefix + text.encode(), digest_size=16).digest()
