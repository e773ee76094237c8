"""Personalized RLHF on PyTorch Lightning: one policy, many users, learned from who preferred which answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prlhf_lightning.data import DataSource, FileSource, HubSource, PreferenceDataModule, SimulatedSource
    from prlhf_lightning.data.users import UserVocabulary
    from prlhf_lightning.inference import GenerationRequest, Generator
    from prlhf_lightning.losses import BradleyTerryLoss, DPOLoss, MarginLoss, PreferenceLoss, UnpairedLoss
    from prlhf_lightning.online import Reward, RewardFunction
    from prlhf_lightning.policies import CausalLMPolicy, LoRA, Policy, Sampling
    from prlhf_lightning.rewards import RewardBackbone
    from prlhf_lightning.training import (
        FSDP1Strategy,
        FSDP2Strategy,
        OnlineDataModule,
        OnlineRL,
        Optim,
        PersonalizedLM,
        PersonalizedRewardModel,
        RewardDataModule,
    )
    from prlhf_lightning.types import LogProbs, LossOutput, PairLogProbs, PreferenceBatch, SoftPrompt, Tokens, Users
    from prlhf_lightning.user_models import (
        AmortizedUserModel,
        ClusterUserModel,
        CompositeUserModel,
        IndividualUserModel,
        LowRankUserModel,
        TextUserModel,
        UniformUserModel,
        UserModel,
    )

_HOME = {
    "data": ["DataSource", "FileSource", "HubSource", "PreferenceDataModule", "SimulatedSource", "UserVocabulary"],
    "inference": ["GenerationRequest", "Generator"],
    "losses": ["BradleyTerryLoss", "DPOLoss", "MarginLoss", "PreferenceLoss", "UnpairedLoss"],
    "online": ["Reward", "RewardFunction"],
    "rewards": ["RewardBackbone"],
    "training": [
        "FSDP1Strategy",
        "FSDP2Strategy",
        "OnlineDataModule",
        "OnlineRL",
        "Optim",
        "PersonalizedLM",
        "PersonalizedRewardModel",
        "RewardDataModule",
    ],
    "policies": ["CausalLMPolicy", "LoRA", "Policy", "Sampling"],
    "types": ["LogProbs", "LossOutput", "PairLogProbs", "PreferenceBatch", "SoftPrompt", "Tokens", "Users"],
    "user_models": [
        "AmortizedUserModel",
        "ClusterUserModel",
        "CompositeUserModel",
        "IndividualUserModel",
        "LowRankUserModel",
        "TextUserModel",
        "UniformUserModel",
        "UserModel",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AmortizedUserModel",
    "BradleyTerryLoss",
    "CausalLMPolicy",
    "ClusterUserModel",
    "CompositeUserModel",
    "DPOLoss",
    "DataSource",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "FileSource",
    "GenerationRequest",
    "Generator",
    "HubSource",
    "IndividualUserModel",
    "LoRA",
    "LogProbs",
    "LossOutput",
    "LowRankUserModel",
    "MarginLoss",
    "OnlineDataModule",
    "OnlineRL",
    "Optim",
    "PairLogProbs",
    "PersonalizedLM",
    "PersonalizedRewardModel",
    "Policy",
    "PreferenceBatch",
    "PreferenceDataModule",
    "PreferenceLoss",
    "Reward",
    "RewardBackbone",
    "RewardDataModule",
    "RewardFunction",
    "Sampling",
    "SimulatedSource",
    "SoftPrompt",
    "TextUserModel",
    "Tokens",
    "UniformUserModel",
    "UnpairedLoss",
    "UserModel",
    "UserVocabulary",
    "Users",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds to load."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
