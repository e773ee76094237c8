"""Writing with a trained model: many users, prompts and strengths in one batch. Knows nothing of training."""

from prlhf_lightning.inference.engine import Engine
from prlhf_lightning.inference.requests import Completion, Generation, Piece
from prlhf_lightning.inference.generator import PersonalizedWriter

__all__ = ["Completion", "Engine", "Generation", "PersonalizedWriter", "Piece"]
