"""LightningModules: composition only."""

from prlhf_lightning.modules.checkpoint_io import SealedCheckpointIO
from prlhf_lightning.modules.optim import Optim, RowwiseAdamW
from prlhf_lightning.modules.personalized_lm import PersonalizedLM, Term

__all__ = ["Optim", "PersonalizedLM", "RowwiseAdamW", "SealedCheckpointIO", "Term"]
