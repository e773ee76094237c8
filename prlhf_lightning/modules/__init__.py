"""LightningModules: composition only."""

from prlhf_lightning.modules.checkpoint_io import SealedCheckpointIO
from prlhf_lightning.modules.objective import Term
from prlhf_lightning.modules.optim import Optim, RowwiseAdamW
from prlhf_lightning.modules.personalized_lm import PersonalizedLM
from prlhf_lightning.modules.sharding import FSDP2Strategy
from prlhf_lightning.modules.sharding_fsdp1 import FSDP1Strategy

__all__ = [
    "FSDP1Strategy",
    "FSDP2Strategy",
    "Optim",
    "PersonalizedLM",
    "RowwiseAdamW",
    "SealedCheckpointIO",
    "Term",
]
