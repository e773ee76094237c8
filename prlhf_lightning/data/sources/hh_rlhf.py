"""Data source of Anthropic's HH-RLHF dialogues, with a pseudo-user each for helpful and harmless."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.records import Message, Text
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, Part, left_out, original, unusable
from prlhf_lightning.errors import ConfigurationError

_SCHEMA = Schema("a row of HH-RLHF")
_HUMAN, _LAST = "\n\nHuman:", "\n\nAssistant:"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
USERS = {"helpful": ["helpful-base"], "harmless": ["harmless-base"]}


class HHRLHFSource(DerivedSource):
    r"""Pairs of dialogues that differ in their last reply, by pseudo-users who value helpfulness or harmlessness.

    The data set does not identify annotators. As in work on hidden context and in Variational Preference Learning
    (`get_hh_rlhf_dataset` in `hidden_context/train_llm_preference_model.py` of github.com/WEIRDLabUW/vpl_llm), the
    annotators of helpfulness are one user and those of harmlessness another. Reads `Anthropic/hh-rlhf` on the hub, or a
    local copy of its folders with `train.jsonl.gz` and `test.jsonl.gz` (or unpacked). A row has two transcripts,
    `chosen` and `rejected`, with turns that begin with "\n\nHuman:" and "\n\nAssistant:" (see its card). The test files
    are the validation split. Pairs are left out if their transcripts differ before the last reply, or end in equal or
    empty replies or in none.

    Args:
        folder: The local copy; without it the data set is loaded from the hub.
        hub: Name on the hub, or a local copy that `datasets` loads.
        revision: Branch, tag or commit on the hub.
        users: The folders of each pseudo-user's pairs; by default `{helpful: [helpful-base], harmless:
            [harmless-base]}`.
        conversations: Whether to convert transcripts to messages, which the tokenizer's chat template renders.

    Raises:
        FeedbackFormatError: A row is not in the original schema.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        hub: str = "Anthropic/hh-rlhf",
        revision: str | None = None,
        users: Mapping[str, Sequence[str]] | None = None,
        conversations: bool = False,
    ) -> None:
        self.users = {user: list(folders) for user, folders in (USERS if users is None else users).items()}
        if not self.users or not all(self.users.values()):
            raise ConfigurationError(f"HHRLHFSource: users is {self.users}; give each user's folders, as in {USERS}.")
        self.conversations = conversations
        names: dict[Split, str] = {"train": "train", "validation": "test"}
        self._of_user: dict[Split, list[tuple[str, Part]]] = {
            split: [
                (user, original(_file(folder, of, name), hub, name, revision=revision, data_files=f"{of}/{name}*"))
                for user, folders in self.users.items()
                for of in folders
            ]
            for split, name in names.items()
        }
        parts = {split: [part for _, part in parts] for split, parts in self._of_user.items()}
        super().__init__(parts, users=self.users, conversations=conversations)

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each user's pairs in turn."""
        for user, part in self._of_user[split]:
            for where, row in part.rows():
                (prompt, chosen), (other, rejected) = (_dialogue(row, where, name) for name in ("chosen", "rejected"))
                if _HUMAN in chosen or _HUMAN in rejected:
                    counts[left_out("no reply at the end")] += 1
                elif prompt != other:
                    counts[left_out("the dialogues differ before the last reply")] += 1
                elif reason := self._unusable(chosen, rejected):
                    counts[left_out(reason)] += 1
                else:
                    yield where, {"user_id": user, **self._row(prompt, chosen, rejected)}

    def _unusable(self, chosen: str, rejected: str) -> str | None:
        # Messages are stripped of surrounding white space.
        return unusable(*((chosen.strip(), rejected.strip()) if self.conversations else (chosen, rejected)), "replies")

    def _row(self, prompt: str, chosen: str, rejected: str) -> dict[str, Text]:
        if not self.conversations:
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        parts = _SPEAKER.split(prompt.removesuffix(_LAST))[1:]
        turns: list[Message] = [
            {"role": _ROLES[speaker], "content": text.strip()}
            for speaker, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        replies: dict[str, Text] = {
            name: [{"role": "assistant", "content": text.strip()}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        return {"prompt": turns, **replies}


def _file(folder: str | Path | None, of: str, name: str) -> Path | None:
    if folder is None:
        return None
    packed = Path(folder) / of / f"{name}.jsonl.gz"
    unpacked = packed.with_suffix("")
    return unpacked if unpacked.exists() and not packed.exists() else packed


def _dialogue(row: Mapping[str, Any], where: str, name: str) -> tuple[str, str]:
    """Split a transcript into the part before the last reply, and the reply."""
    text = _SCHEMA.get(row, where, name, kind=str)
    head, cue, reply = text.rpartition(_LAST)
    if not cue or not text.startswith(_HUMAN):
        _SCHEMA.fail(where, (name,), r"is no transcript from '\n\nHuman:' to a reply after '\n\nAssistant:'")
    return head + cue, reply
