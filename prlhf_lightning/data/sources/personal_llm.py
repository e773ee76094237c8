"""Data source of PersonalLLM: eight answers per prompt, judged by simulated mixtures of ten reward models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from random import Random
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, left_out, original, unusable
from prlhf_lightning.data.sources.files import Paths
from prlhf_lightning.errors import ConfigurationError

Floats: TypeAlias = npt.NDArray[np.float64]

_SCHEMA = Schema("a row of PersonalLLM")
_RESPONSES = range(1, 9)

#: Mean and standard deviation of each reward model's scores, to standardize them, sorted by name.
#: From `PersonalLLM/eval/constants.py` in github.com/namkoong-lab/PersonalLLM.
REWARD_MODELS: dict[str, tuple[float, float]] = {
    "beaver_7b": (6.233516894340515, 3.012641148973965),
    "gemma_2b": (4.3304170169830325, 2.038611338958803),
    "gemma_7b": (1.6259730467796325, 2.6096741570264976),
    "llama3_sfairx": (1.0637639780044557, 2.953017385451928),
    "mistral_raft": (8.309211883544922, 3.0728436748484533),
    "mistral_ray": (3.0136284782886507, 1.6902981149232585),
    "mistral_weqweasdas": (7.071075622558594, 2.578636650248985),
    "oasst_deberta_v3": (2.8976835689097644, 1.7207868789061331),
    "oasst_pythia_1b": (4.293944010734558, 2.3018268820938133),
    "oasst_pythia_7b": (4.706351243972779, 1.3659142113789966),
}


class PersonalLLMSource(DerivedSource):
    """Pairs of answers judged by simulated users, each a mixture of reward models drawn from a Dirichlet distribution.

    Reads files of, or `namkoong-lab/PersonalLLM` on the hub: a `prompt`, `response_1` to `response_8`, and the score
    of each by ten reward models, `response_1_gemma_2b` and so on (columns and names of the models as read in
    `PersonalLLM/prepare.py` and `train_basis.py` of github.com/facebookresearch/LoRe). Users are drawn as in
    `data/gen_pref_interaction_database.py` of github.com/namkoong-lab/PersonalLLM: weights from a symmetric Dirichlet
    distribution, standardized scores, and preference for the higher weighted sum. The assignment of users to prompts is
    our own: each prompt draws `judges` users, and two answers for each of them. (The original draws 25 to 49 prompts
    per user, and never the eighth answer.) The data set's test split is the validation split, in which
    `num_unseen_users` more users judge as often as the others.

    Args:
        train: File or files of training prompts; without any the data set is loaded from the hub.
        validation: File or files of validation prompts, if `train` is given.
        hub: Name on the hub, or a local copy that `datasets` loads.
        revision: Branch, tag or commit on the hub.
        num_users: Users in training.
        num_unseen_users: Users with validation pairs only.
        judges: Users who judge each prompt.
        alpha: Parameter of the Dirichlet distribution; with a small one, a user follows mostly one reward model.
        seed: Seed of users and of the assignment of users to prompts.

    Raises:
        FeedbackFormatError: A row is not in the original schema.
    """

    def __init__(
        self,
        train: Paths | None = None,
        validation: Paths | None = None,
        hub: str = "namkoong-lab/PersonalLLM",
        revision: str | None = None,
        num_users: int = 1000,
        num_unseen_users: int = 100,
        judges: int = 5,
        alpha: float = 0.01,
        seed: int = 0,
    ) -> None:
        if validation is not None and train is None:
            raise ConfigurationError("PersonalLLMSource: validation is a file, so train must be one too.")
        if not 1 <= judges <= num_users or num_unseen_users < 0 or alpha <= 0:
            raise ConfigurationError(
                f"PersonalLLMSource: judges={judges}, num_users={num_users}, num_unseen_users={num_unseen_users} and "
                f"alpha={alpha}; judges is from 1 to num_users, num_unseen_users at least 0, and alpha above 0."
            )
        parts: dict[Split, Any] = {"train": [original(train, hub, "train", revision=revision)]}
        if train is None or validation is not None:
            parts["validation"] = [original(validation, hub, "test", revision=revision)]
        super().__init__(parts, users=(num_users, num_unseen_users, alpha, seed), judges=judges)
        self.num_users, self.num_unseen_users = num_users, num_unseen_users
        self.judges, self.alpha, self.seed = judges, alpha, seed

    @cached_property
    def weights(self) -> Floats:
        """`[U, 10]` weight of each reward model for each user, the unseen ones last; rows sum to 1."""
        rows = self.num_users + self.num_unseen_users
        weights: Floats = np.random.RandomState(self.seed).dirichlet([self.alpha] * len(REWARD_MODELS), size=rows)
        if not np.isfinite(weights).all():  # all ten draws of a user underflowed
            raise ConfigurationError(f"PersonalLLMSource: alpha={self.alpha} is too small to draw users by; raise it.")
        return weights

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the judgments on each prompt in turn."""
        for part in self._parts[split]:
            for number, (where, row) in enumerate(part.rows()):
                draw = Random(f"{self.seed} {split} {number}")  # one per row, so more rows do not change earlier draws
                prompt = _SCHEMA.get(row, where, "prompt", kind=str)
                texts = [_SCHEMA.get(row, where, f"response_{i}", kind=str) for i in _RESPONSES]
                scores = np.array([_scores(row, where, i) for i in _RESPONSES])
                for user in self._judges(split, draw):
                    first, second = draw.sample(range(len(texts)), 2)
                    gap = float(self.weights[user] @ (scores[first] - scores[second]))
                    chosen, rejected = (texts[i] for i in ((first, second) if gap > 0 else (second, first)))
                    reason = unusable(chosen, rejected, "answers") or ("equal scores" if gap == 0 else None)
                    if reason:
                        counts[left_out(reason)] += 1
                        continue
                    yield where, {"user_id": self._name(user), "prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _judges(self, split: Split, draw: Random) -> list[int]:
        seen = draw.sample(range(self.num_users), self.judges)
        if split == "train" or not self.num_unseen_users:
            return seen
        share = self.judges * self.num_unseen_users / self.num_users  # as many judgments each as the seen users
        count = min(int(share) + (draw.random() < share % 1), self.num_unseen_users)
        return seen + draw.sample(range(self.num_users, self.num_users + self.num_unseen_users), count)

    def _name(self, user: int) -> str:
        return f"user-{user}" if user < self.num_users else f"unseen-{user - self.num_users}"


def _scores(row: Mapping[str, Any], where: str, response: int) -> list[float]:
    """Return one response's ten standardized scores."""
    return [
        (_SCHEMA.number(row, where, f"response_{response}_{name}") - mean) / deviation
        for name, (mean, deviation) in REWARD_MODELS.items()
    ]
