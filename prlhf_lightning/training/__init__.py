"""Training: the LightningModule, its optimizer, callbacks, checkpoints and strategies."""

from prlhf_lightning.training.checkpointing import ChecksummedCheckpointIO
from prlhf_lightning.training.fsdp import FSDP1Strategy
from prlhf_lightning.training.module import PersonalizedLM
from prlhf_lightning.training.objective import Term
from prlhf_lightning.training.optim import Optim, RowwiseAdamW
from prlhf_lightning.training.sharding import FSDP2Strategy

__all__ = [
    "ChecksummedCheckpointIO",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "Optim",
    "PersonalizedLM",
    "RowwiseAdamW",
    "Term",
]
