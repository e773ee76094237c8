"""What scorers of texts have in common: texts and users in, a reward for each out, whatever model computes it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.records import FeedbackRecord, Text
from prlhf_lightning.data.tokenization import Excess, FeedbackTokenizer, TokenizationSettings, TokenizedRecord
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

_AT_ONCE = 1024  # texts that are rendered and tokenized together


@dataclass(frozen=True)
class Scored:
    """Rewards of n texts.

    Attributes:
        rewards: `[n]` float32, on the CPU; NaN for a text that has none.
        problems: Why a text has none, by its number.
        tokens: Number of tokens of all texts that have one, each with its prompt.
    """

    rewards: Tensor
    problems: Mapping[int, str]
    tokens: int = 0


class Scorer(ABC):
    """Gives texts rewards for users. Texts are rendered and tokenized as in training.

    A text over a length limit is cut if training cut such texts (`overlong: truncate`); otherwise it has no reward.

    Args:
        tokenizer: Of the model.
        settings: Tokenization settings of training.
        vocabulary: The users of the model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: TokenizationSettings, vocabulary: UserVocabulary
    ) -> None:
        self.vocabulary = vocabulary
        if settings.overlong == "drop":
            settings = replace(settings, overlong="error")  # says what is too long
        self._tokenize = FeedbackTokenizer(tokenizer, settings)

    def knows(self, user_id: str) -> bool:
        """Return whether a user has a reward of their own; the generic user stands in for others."""
        return user_id in self.vocabulary

    @property
    def cut(self) -> Mapping[str, Excess]:
        """The texts that were cut so far, by field: `prompt`, `completion` or `user_text`."""
        return self._tokenize.excess

    def score(
        self,
        user_ids: Sequence[str],
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the rewards of n texts, `[n]` float32 on the CPU; NaN for a text that has none (see `scored`)."""
        return self.scored(user_ids, prompts, completions, user_texts).rewards

    def scored(
        self,
        user_ids: Sequence[str],
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_texts: Sequence[str] | None = None,
        wheres: Sequence[str] | None = None,
    ) -> Scored:
        """Return the rewards of n texts, and why some have none.

        A reward orders completions of one prompt for one user; differences are log-odds where the loss is a likelihood.

        Args:
            user_ids: n ids; the generic user stands in for unknown ones.
            prompts: n strings or conversations.
            completions: n strings, or lists of one assistant message.
            user_texts: n texts about the users, empty for none; for models that read them.
            wheres: n names of the texts, for messages.

        Raises:
            ConfigurationError: The numbers differ, or a conversation meets a tokenizer without chat template.
        """
        count = len(user_ids)
        texts = [""] * count if user_texts is None else user_texts
        names = [f"text {number}" for number in range(count)] if wheres is None else wheres
        if not count == len(prompts) == len(completions) == len(texts) == len(names):
            raise ConfigurationError(
                f"There are {count} users, {len(prompts)} prompts, {len(completions)} completions and {len(texts)} "
                "texts about users; give equally many."
            )
        records = [_record(*row) for row in zip(user_ids, prompts, completions, texts, strict=True)]
        return self.scored_records(records, names)

    def scored_records(self, records: Sequence[FeedbackRecord], wheres: Sequence[str]) -> Scored:
        """Return the rewards of n records' `chosen`, and why some have none; see `scored`.

        Args:
            records: n thumbs-up; with `tools`, if the prompt has them.
            wheres: n names of the texts, for messages.
        """
        count = len(records)
        problems: dict[int, str] = {}
        ids: dict[int, TokenizedRecord] = {}
        for start in range(0, count, _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, count))
            self._read(part, records, wheres, ids, problems)
        rewards = torch.full((count,), math.nan)
        if ids:
            found = self._rewards([records[number].user_id for number in ids], list(ids.values())).float().cpu()
            rewards[torch.tensor(list(ids))] = found
            problems |= {number: "its reward is NaN" for number in ids if rewards[number] != rewards[number]}
        return Scored(rewards, problems, sum(len(one.prompt) + len(one.chosen) for one in ids.values()))

    def _read(
        self,
        part: Sequence[int],
        records: Sequence[FeedbackRecord],
        names: Sequence[str],
        ids: dict[int, TokenizedRecord],
        problems: dict[int, str],
    ) -> None:
        """Tokenize a part of the texts: all together, or one by one if one of them has a problem."""
        try:
            rows = self._tokenize([records[number] for number in part], [names[number] for number in part])
            ids |= {number: row for number, row in zip(part, rows, strict=True) if row is not None}
        except FeedbackFormatError as error:
            if len(part) == 1:
                problems[part[0]] = f"{error.field} {error.problem}" if error.field else error.problem
                return
            for number in part:
                self._read([number], records, names, ids, problems)

    @abstractmethod
    def _rewards(self, user_ids: Sequence[str], texts: Sequence[TokenizedRecord]) -> Tensor:
        """Return the rewards of n texts, `[n]`; each text is the record's `chosen`."""


def _record(user_id: str, prompt: Text, completion: Text, user_text: str) -> FeedbackRecord:
    """Return a text as a thumbs-up, with prompt and completion in the same form."""
    if isinstance(completion, str) and not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    return FeedbackRecord(user_id, prompt, completion, user_text=user_text or None, thumb=True)
