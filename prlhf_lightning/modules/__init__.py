"""LightningModules: composition only."""

from prlhf_lightning.modules.optim import Optim, RowwiseAdamW
from prlhf_lightning.modules.personalized_lm import PersonalizedLM, Term
from prlhf_lightning.modules.sharding import FSDP2Strategy

__all__ = ["FSDP2Strategy", "Optim", "PersonalizedLM", "RowwiseAdamW", "Term"]
