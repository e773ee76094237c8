"""Prompts without judgements, to be answered for each user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from prlhf_lightning.data.text_ids import Ids


class Requests(Dataset[dict[str, Any]]):
    """Every prompt for every user, the users of a prompt side by side; without completions or texts about users.

    Args:
        places: Where each of the P prompts stands.
        prompts: P arrays of token ids.
        user_ids: The users.
    """

    def __init__(self, places: Sequence[str], prompts: Sequence[Ids], user_ids: Sequence[str]) -> None:
        self._places, self._prompts, self._user_ids = places, prompts, user_ids

    def __len__(self) -> int:
        return len(self._prompts) * len(self._user_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, user = divmod(index, len(self._user_ids))
        nothing: dict[str, list[int]] = {f"{part}_ids": [] for part in ("user_text", "chosen", "rejected")}
        prompt_ids = self._prompts[prompt].tolist()
        return {"user_id": self._user_ids[user], "prompt_ids": prompt_ids, **nothing, "record": index}

    def where(self, record: int) -> str:
        """Return where the prompt of a row stands."""
        return self._places[record // len(self._user_ids)]
