"""Data source of Personalized Soups: six users with opposed preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.data.records import Text
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, Part, check_template, filled, left_out, unusable
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.errors import FeedbackFormatError

_SCHEMA = Schema("a row of the Personalized Soups comparisons")
_KOALA = Schema("a row of the Koala prompts")

#: The sentence in each file's inputs that states the user's preference, in the order of users 1 to 6.
PREFERENCE_PROMPTS: dict[str, str] = {
    "P1A": "Generate a response that can be easily understood by an elementary school student.",
    "P1B": "Generate a response that only a PhD Student in that specific field could understand.",
    "P2A": "Generate a response that is concise and to the point without being verbose.",
    "P2B": "Generate a response that is very informative without missing any background information.",
    "P3A": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    "P3B": "Generate a response in an unfriendly manner.",
}


class PersonalizedSoupsSource(DerivedSource):
    """Comparisons by six simulated users with opposed preferences, named "1" to "6".

    Reads `rm_training/{P1A,P1B,P2A,P2B,P3A,P3B}.json` of the archive that github.com/joeljang/RLPHF links to, with
    `user_input`, `completion_a` (the preferred one, as in its `training_reward_model.py`) and `completion_b`. Follows
    the protocol of arXiv:2402.05133 (`data/psoups_dataset.ipynb` in github.com/HumainLab/Personalized_RLHF): the
    sentence that states the preference is removed from the input; equal completions and repeated comparisons of a user
    are left out (and empty ones, if any). The authors print, for users 1 to 6: 48,300, 48,825, 47,350, 49,220, 49,155
    and 48,565 rows, of which 8,959, 9,069, 8,239, 8,626, 9,356 and 9,222 remain, 53,471 in all.

    There is one split: hold out prompts with the data module's `validation_fraction`. (The authors hold out rows, so
    most of their validation prompts are also in training.)

    Args:
        folder: Folder with the six files.
        koala: The archive's `koala_eval_50.json`, rows with a `prompt`; `predict` answers them for every user.
        prompt_format: Format of an input or Koala prompt, with `{prompt}`.

    Raises:
        FeedbackFormatError: A row is not in the original schema, or no input of a file states its preference.
    """

    def __init__(self, folder: str | Path, koala: str | Path | None = None, prompt_format: str = "{prompt}") -> None:
        check_template("prompt_format", prompt_format, ("prompt",))
        parts = [Part(FileSource(Path(folder) / f"{profile}.json")) for profile in PREFERENCE_PROMPTS]
        super().__init__({"train": parts}, prompt_format=prompt_format)
        self.folder, self.koala, self.prompt_format = Path(folder), koala, prompt_format

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each user's comparisons in turn."""
        for user, (profile, part) in enumerate(zip(PREFERENCE_PROMPTS, self._parts[split], strict=True), start=1):
            seen: set[bytes] = set()
            stated = False
            for where, row in part.rows():
                asked, chosen, rejected = (
                    _SCHEMA.get(row, where, name, kind=str) for name in ("user_input", "completion_a", "completion_b")
                )
                stated = stated or PREFERENCE_PROMPTS[profile] in asked
                if reason := unusable(chosen, rejected, "completions"):
                    counts[left_out(reason)] += 1
                elif (key := _key(asked, chosen, rejected)) in seen:
                    counts[left_out("repeated comparisons")] += 1
                else:
                    seen.add(key)
                    if PREFERENCE_PROMPTS[profile] not in asked:
                        counts["kept though the input does not state the preference"] += 1
                    prompt = self._prompt(asked.replace(PREFERENCE_PROMPTS[profile], "").strip())
                    yield where, {"user_id": str(user), "prompt": prompt, "chosen": chosen, "rejected": rejected}
            if not stated:
                raise FeedbackFormatError(
                    f"no 'user_input' states {PREFERENCE_PROMPTS[profile]!r}",
                    "this is another user's file or another version: check which file it is",
                    where=f"{self.folder / profile}.json",
                )

    def prompts(self) -> Iterator[tuple[str, Text]]:
        """Yield the Koala prompts, if their file is given."""
        for where, row in read_rows(self.koala) if self.koala is not None else ():
            yield where, self._prompt(_KOALA.get(row, where, "prompt", kind=str))

    def _prompt(self, prompt: str) -> str:
        return filled(self.prompt_format, {"prompt": prompt})


def _key(*texts: str) -> bytes:
    digest = blake2b(digest_size=16)
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()
