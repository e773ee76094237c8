"""Data source of UltraFeedback-P: four users, each of whom judges by one attribute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, Part, left_out, unusable
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.errors import ConfigurationError

_SCHEMA = Schema("a row of UltraFeedback-P")

#: The folder of each user's pairs.
FOLDERS = {"helpfulness": "8", "honesty": "4", "instruction_following": "2", "truthfulness": "1"}


class UltraFeedbackPSource(DerivedSource):
    """Pairs by simulated users who prefer the more helpful, honest, instruction-following or truthful answer.

    Reads the folder that `hidden_context/data_utils/ultrafeedback_augment.py` of Variational Preference Learning
    (Poddar et al. 2024, github.com/WEIRDLabUW/vpl_llm) writes: `UltraFeedback_single_P_4` for four users or
    `UltraFeedback_84_P` for two. It has the folders `8`, `4`, `2` and `1`, each with `train.jsonl` and `test.jsonl`. A
    row has a `prompt`, `chosen` and `rejected` (both begin with "Human: ", the prompt and "Assistant: "), and whether
    the users disagree (`controversial`). The test files are the validation split. The authors state no counts.

    Args:
        folder: The folder.
        users: Attributes of the users to read; `[helpfulness, honesty]` is UF-P-2.
        controversial_only: Leave out pairs on which all users agree.

    Raises:
        FeedbackFormatError: A row is not in this schema.
    """

    def __init__(
        self, folder: str | Path, users: Sequence[str] = tuple(FOLDERS), controversial_only: bool = False
    ) -> None:
        if unknown := [user for user in users if user not in FOLDERS]:
            raise ConfigurationError(f"UltraFeedbackPSource: no user {unknown[0]!r}; there are {', '.join(FOLDERS)}.")
        if not users:
            raise ConfigurationError(f"UltraFeedbackPSource: users is empty; give some of {', '.join(FOLDERS)}.")
        self.users, self.controversial_only = list(users), controversial_only
        names: dict[Split, str] = {"train": "train", "validation": "test"}
        parts = {
            split: [Part(FileSource(Path(folder) / FOLDERS[user] / f"{name}.jsonl")) for user in users]
            for split, name in names.items()
        }
        super().__init__(parts, users=self.users, controversial_only=controversial_only)

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each user's pairs in turn."""
        for user, part in zip(self.users, self._parts[split], strict=True):
            for where, row in part.rows():
                prompt = _SCHEMA.get(row, where, "prompt", kind=str)
                chosen, rejected = (_answer(row, where, name, prompt) for name in ("chosen", "rejected"))
                if self.controversial_only and not _SCHEMA.get(row, where, "controversial", kind=bool):
                    counts[left_out("all users agree")] += 1
                elif reason := unusable(chosen, rejected, "answers"):
                    counts[left_out(reason)] += 1
                else:
                    yield where, {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _answer(row: Mapping[str, Any], where: str, name: str, prompt: str) -> str:
    text, lead = _SCHEMA.get(row, where, name, kind=str), f"Human: {prompt}\n\nAssistant: "
    if not text.startswith(lead):
        _SCHEMA.fail(where, (name,), "does not begin with 'Human: ', the prompt, and 'Assistant: '")
    return text[len(lead) :]
