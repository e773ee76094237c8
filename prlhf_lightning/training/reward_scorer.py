"""Scorers of explicit reward models and of policies, which both give a text a reward for each user."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.tokenization import TokenizationSettings, TokenizedRecord
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.rewards import RewardModel, TextTable
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import KEY, entry_of, is_reward_model
from prlhf_lightning.training.module import PersonalizedLM
from prlhf_lightning.training.reward_module import PersonalizedRewardModel
from prlhf_lightning.training.scorer import Scorer
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.trust import only_trusted_classes

_ROWS = 16  # texts of a policy's forward pass


class RewardScorer(Scorer):
    """Scores texts by an explicit reward model.

    Each distinct text of a call is embedded once. Vectors are not kept on disk, as scored texts are often new and many.

    Args:
        model: A trained reward model; its backbone is built.
        settings: Tokenization settings of its training.
    """

    def __init__(self, model: RewardModel, settings: TokenizationSettings) -> None:
        super().__init__(model.backbone.tokenizer, settings, _users(model.vocabulary))
        self.model = model.eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        trust_classes: Collection[str] | None = None,
        option: str = "reward_model",
    ) -> Self:
        """Return the scorer of a checkpoint of an explicit reward model.

        Args:
            path: A checkpoint, or the folder of its run.
            device: Device of the model.
            trust_classes: Dotted paths of classes outside this package that the checkpoint may name.
            option: Name of the option that gave the path, for messages.

        Raises:
            ConfigurationError: There is no such checkpoint, or it is not of a reward model.
            DamagedCheckpointError: The file is damaged.
        """
        file, content = _read(path, option)
        if not is_reward_model(content):
            raise ConfigurationError(
                f"{option}: {file} is of a policy and not of a reward model; give one with `model.backbone`."
            )
        return cls.of_content(content, f"{option}: {file}", device, trust_classes)

    @classmethod
    def of_content(
        cls, content: Mapping[str, Any], source: str, device: str, trust_classes: Collection[str] | None
    ) -> Self:
        """Return the scorer of a reward model's checkpoint from the content of the file; see `load`."""
        key = PersonalizedRewardModel.CHECKPOINT_HYPER_PARAMS_KEY
        settings = copy.deepcopy(content.get(key, {})) | {"cache_features": False}
        needed = {"state_dict": content["state_dict"], KEY: content[KEY], key: settings}
        try:
            with only_trusted_classes(source, trust_classes, False, settings):
                model = lightning_compat.load_from_content(PersonalizedRewardModel, needed)
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"{source} cannot be loaded: {error}") from error
        return cls(model.to(device), TokenizationSettings.from_kept(entry_of(content).get("tokenization") or {}))

    def _rewards(self, user_ids: Sequence[str], texts: Sequence[TokenizedRecord]) -> Tensor:
        table, index = TextTable.of((text.prompt, text.chosen) for text in texts)
        features = self.model.features_of(table)
        rows = self.model.rows_of(user_ids)
        return self.model.rewards(features, rows, index.to(rows.device))


class ImplicitRewardScorer(Scorer):
    """Scores texts by the implicit reward of a policy: `beta log pi(y|x, u) / pi_ref(y|x)`, or that of its loss.

    Args:
        model: A trained policy with a pairwise loss.
    """

    def __init__(self, model: PersonalizedModel) -> None:
        super().__init__(model.policy.tokenizer, model.tokenization, _users(model.vocabulary))
        self.model = model.eval()

    @classmethod
    def of_content(
        cls, content: Mapping[str, Any], source: str, device: str, trust_classes: Collection[str] | None
    ) -> Self:
        """Return the scorer of a policy's checkpoint from the content of the file; see `load_scorer`."""
        try:
            model = PersonalizedLM.from_content(content, trust_classes=trust_classes, source=source)
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"{source} cannot be loaded: {error}") from error
        if model.loss.feedback != "pairs":
            raise ConfigurationError(
                f"{type(model.loss).__name__} of {source} ranks no pairs; give a checkpoint of a preference loss."
            )
        return cls(model.to(device))

    def _rewards(self, user_ids: Sequence[str], texts: Sequence[TokenizedRecord]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda row: len(texts[row].prompt) + len(texts[row].chosen))
        rewards = torch.zeros(len(texts))
        for start in range(0, len(order), _ROWS):
            part = order[start : start + _ROWS]
            rows = [
                {"user_id": user_ids[n], "record": n} | {f"{name}_ids": ids for name, ids in texts[n]._asdict().items()}
                for n in part
            ]
            rewards[part] = self.model.completion_rewards(collate(rows).to(self.model.device)).cpu()
        return rewards


def load_scorer(
    path: str | Path,
    device: str = "cpu",
    trust_classes: Collection[str] | None = None,
    option: str = "reward_model",
) -> Scorer:
    """Return the scorer of any checkpoint of `fit`: of a reward model, or of a policy by its implicit reward.

    Args:
        path: A checkpoint, or the folder of its run.
        device: Device of the model.
        trust_classes: Dotted paths of classes outside this package that the checkpoint may name.
        option: Name of the option that gave the path, for messages.

    Raises:
        ConfigurationError: There is no such checkpoint, or its loss defines no rewards of pairs.
        DamagedCheckpointError: The file is damaged.
    """
    file, content = _read(path, option)
    kind = RewardScorer if is_reward_model(content) else ImplicitRewardScorer
    return kind.of_content(content, f"{option}: {file}", device, trust_classes)


def _read(path: str | Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint of a file or a run's folder, and its content."""
    file = checkpoint_files.checkpoint_of(Path(path), option)
    if not file.is_file():
        raise ConfigurationError(
            f"{option}: there is no checkpoint {file}; give one that `fit` wrote, or the folder of its run."
        )
    try:
        content: dict[str, Any] = checkpoint_files.load(file, mmap=True)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{option}: {error}") from error
    try:
        entry_of(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {file}: {error}") from error
    if not isinstance(content.get("state_dict"), dict):
        raise DamagedCheckpointError(f"{option}: {file} holds no weights; give a checkpoint that `fit` wrote.")
    return file, content


def _users(vocabulary: UserVocabulary | None) -> UserVocabulary:
    if vocabulary is None:
        raise ConfigurationError("The users are not known yet: train the model or load a checkpoint first.")
    return vocabulary
