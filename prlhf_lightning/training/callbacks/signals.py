"""Handling of SIGTERM and SIGINT: training stops between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StopOnSignal(Callback):
    """Stops all processes after the optimizer step in which SIGTERM (SLURM, Kubernetes) or SIGINT (Ctrl+C) arrives.

    Lightning itself stops at SIGINT at any point, even in the middle of an optimizer step. At SIGTERM it broadcasts
    from within the signal handler, between the collective calls of training. Here all processes agree on the step after
    which they stop, so they save a consistent state; any rank may receive the signal. A second Ctrl+C stops at once.
    The exit code is the shell's code for the signal.
    """

    def __init__(self) -> None:
        self._signal = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers; Lightning restores the original ones at the end of the fit."""
        self._signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._take_note)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        told = f"\n{signal.Signals(number).name}: stopping after this step" + (
            " (Ctrl+C again: at once)\n" if number == signal.SIGINT else "\n"
        )
        os.write(2, told.encode())  # the only safe way to write in a signal handler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before a new step, without accumulated gradients or a pending validation: checkpoints hold neither."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last step, before anything else starts."""
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Also stop during a validation in training, which may take longer than a scheduler waits."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Any rank may receive the signal, and all must stop after the same step.
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))
