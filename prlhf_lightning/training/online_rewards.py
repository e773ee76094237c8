"""Rewards of online RL by trained models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.records import Text
from prlhf_lightning.online.rewards import RewardFunction
from prlhf_lightning.training.reward_scorer import load_scorer


class RewardModelReward(RewardFunction):
    """The reward of a trained model for the row's user; the generic user stands in for users that it does not know.

    Args:
        path: A checkpoint of a reward model, or of a policy, whose implicit reward is taken; or the folder of its run.
        device: Device of the model.
        trust_classes: Dotted paths of classes outside this package that the checkpoint may name.
    """

    def __init__(self, path: str, device: str = "cpu", trust_classes: list[str] | None = None) -> None:
        self.path, self.device, self.trust_classes = path, device, trust_classes

    def prepare(self, data: PreferenceDataModule) -> None:
        """Load the model, and report how many users it knows."""
        self._scorer = load_scorer(Path(self.path).expanduser(), self.device, self.trust_classes)
        users = data.vocabulary.ids
        known = sum(map(self._scorer.knows, users))
        rank_zero_info(f"The reward model {self.path} knows {known} of {len(users)} users.")

    def __call__(  # type: ignore[override]
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_id: Sequence[str],
        user_text: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return the rewards; NaN for an answer that the model cannot read, such as an empty one."""
        texts = None if user_text is None else [text or "" for text in user_text]
        rewards: list[float] = self._scorer.score(user_id, prompts, completions, texts).tolist()
        return rewards
