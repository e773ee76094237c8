"""What watches over training, and stops it or warns in time."""

from prlhf_lightning.guards.collapse import CollapseMonitor
from prlhf_lightning.guards.learning import LearningMonitor
from prlhf_lightning.guards.memory import ExplainOutOfMemory, is_out_of_memory
from prlhf_lightning.guards.signals import StopOnSignal

__all__ = ["CollapseMonitor", "ExplainOutOfMemory", "LearningMonitor", "StopOnSignal", "is_out_of_memory"]
