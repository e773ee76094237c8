"""LightningModules: composition only."""

from prlhf_lightning.training.checkpointing import SealedCheckpointIO
from prlhf_lightning.training.objective import Term
from prlhf_lightning.training.optim import Optim, RowwiseAdamW
from prlhf_lightning.training.module import PersonalizedLM
from prlhf_lightning.training.sharding import FSDP2Strategy
from prlhf_lightning.training.fsdp import FSDP1Strategy

__all__ = [
    "FSDP1Strategy",
    "FSDP2Strategy",
    "Optim",
    "PersonalizedLM",
    "RowwiseAdamW",
    "SealedCheckpointIO",
    "Term",
]
