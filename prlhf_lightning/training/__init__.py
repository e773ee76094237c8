"""Training: the LightningModule, its optimizer, callbacks, checkpoints and strategies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prlhf_lightning.training.checkpointing import ChecksummedCheckpointIO
    from prlhf_lightning.training.fsdp import FSDP1Strategy
    from prlhf_lightning.training.module import PersonalizedLM
    from prlhf_lightning.training.objective import Term
    from prlhf_lightning.training.online_data import OnlineDataModule
    from prlhf_lightning.training.online_module import OnlineRL
    from prlhf_lightning.training.optim import Optim, RowwiseAdamW
    from prlhf_lightning.training.reward_data import RewardDataModule
    from prlhf_lightning.training.reward_module import PersonalizedRewardModel
    from prlhf_lightning.training.reward_scorer import RewardScorer, load_scorer
    from prlhf_lightning.training.sharding import FSDP2Strategy

_MODULE_OF = {
    "ChecksummedCheckpointIO": "checkpointing",
    "FSDP1Strategy": "fsdp",
    "FSDP2Strategy": "sharding",
    "OnlineDataModule": "online_data",
    "OnlineRL": "online_module",
    "Optim": "optim",
    "PersonalizedLM": "module",
    "PersonalizedRewardModel": "reward_module",
    "RewardDataModule": "reward_data",
    "RewardScorer": "reward_scorer",
    "RowwiseAdamW": "optim",
    "Term": "objective",
    "load_scorer": "reward_scorer",
}

__all__ = [
    "ChecksummedCheckpointIO",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "OnlineDataModule",
    "OnlineRL",
    "Optim",
    "PersonalizedLM",
    "PersonalizedRewardModel",
    "RewardDataModule",
    "RewardScorer",
    "RowwiseAdamW",
    "Term",
    "load_scorer",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: reading a checkpoint needs no Lightning, which takes seconds to load."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
