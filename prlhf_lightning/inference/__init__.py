"""Generation with a trained model: many users, prompts and strengths in one batch. Independent of training."""

from prlhf_lightning.inference.engine import Engine
from prlhf_lightning.inference.generator import Generator
from prlhf_lightning.inference.requests import Chunk, Completion, GenerationRequest

__all__ = ["Chunk", "Completion", "Engine", "GenerationRequest", "Generator"]
