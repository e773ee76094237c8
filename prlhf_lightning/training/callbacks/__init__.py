"""Callbacks that monitor training, save results, and stop or warn."""

from prlhf_lightning.training.callbacks.collapse import CollapseMonitor
from prlhf_lightning.training.callbacks.learning import LearningMonitor
from prlhf_lightning.training.callbacks.memory import ExplainOutOfMemory, is_out_of_memory
from prlhf_lightning.training.callbacks.signals import StopOnSignal

__all__ = ["CollapseMonitor", "ExplainOutOfMemory", "LearningMonitor", "StopOnSignal", "is_out_of_memory"]
