"""Feedback as a table of indices, lengths and features, without texts."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.conversations import plain_text
from prlhf_lightning.data.records import Columns, Text, TieError, parse_record
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.utils.progress import counted

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeedbackTable:
    """N rows by U users on I items (responses) to P prompts; the splits' rows are concatenated.

    Attributes:
        users: `[N]` index of the user of each row.
        chosen: `[N]` index of the chosen item.
        rejected: `[N]` index of the rejected one.
        rows: Number of rows of each split, in order.
        ties: Number of rows of each split that were left out, since both completions are the same.
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
        """Return the slice of a split's rows; empty if there are none."""
        names = list(self.rows)
        start = sum(self.rows[name] for name in names[: names.index(split)]) if split in names else 0
        return slice(start, start + self.rows.get(split, 0))


def read_table(source: DataSource, splits: Iterable[Split]) -> FeedbackTable:
    """Return the table of some splits of a source.

    Raises:
        FeedbackFormatError: A row is malformed; the message names the position, the field and the fix.
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


#: Names of the values of `surface_features`, in order, and descriptions for readers.
SURFACE_FEATURES = {
    "words (log)": "more words",
    "word length": "longer words (more formal)",
    "sentences (log)": "more sentences",
    "question marks (log)": "more questions",
    "exclamation marks (log)": "more exclamation marks",
    "line breaks (log)": "more lines",
    "list items (log)": "more list items",
    "emoji (log)": "more emoji",
    "digits (log)": "more digits",
    "share of its words in the prompt": "more of the prompt's words",
}

# Scripts that are written without spaces: a character counts as a word.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Combining vowel signs and accents, which `re` does not count as word characters.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:[^\W{_NO_SPACES}]|[{_MARKS}])+")
_SENTENCE_END = re.compile("[.!?\u2026\u061f\u06d4\u0964]+(?=\\s|$)|[\u3002\uff01\uff1f]+")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+\u2022\u2023\u25e6\u2013]|\(?\d{1,3}[.)]|\(?[A-Za-z]\))[ \t]+\S", re.MULTILINE)
_EMOJI = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
_QUESTION, _EXCLAMATION = re.compile("[?\uff1f\u061f]"), re.compile("[!\uff01]")


def count_words(text: str) -> int:
    """Return the number of words of a text: runs of letters, digits and underscores, or CJK characters and similar."""
    return len(_WORD.findall(text))


def surface_features(prompt: str, response: str) -> tuple[float, ...]:
    """Return the value of each of `SURFACE_FEATURES` for a response to a prompt."""
    words = _WORD.findall(response.lower())
    distinct = set(words)
    in_prompt = len(distinct.intersection(_WORD.findall(prompt.lower())))
    counts = (
        len(_SENTENCE_END.findall(response)),
        len(_QUESTION.findall(response)),
        len(_EXCLAMATION.findall(response)),
        response.count("\n"),
        len(_LIST_ITEM.findall(response)),
        len(_EMOJI.findall(response)),
        sum(map(str.isdigit, response)),
    )
    return (
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        *map(math.log1p, counts),
        in_prompt / max(1, len(distinct)),
    )
