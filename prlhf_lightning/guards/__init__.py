"""What watches over training, and stops it or warns in time."""

from prlhf_lightning.guards.signals import StopOnSignal

__all__ = ["StopOnSignal"]
