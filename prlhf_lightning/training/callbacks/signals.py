"""Ends training between two steps when a person or a scheduler asks for it."""

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
    """Stops after the optimizer step in which SIGTERM (SLURM, Kubernetes) or SIGINT (Ctrl+C) comes, on all processes.

    Lightning by itself stops at SIGINT wherever it is, be it that half of the weights have made a step; and at SIGTERM
    it broadcasts from within the signal's handler, in between the collective calls of training. Here all processes
    agree on the step after which they stop, whichever of them got the signal, so what they save is one state. A second
    Ctrl+C stops at once. The process ends with the code that shells give to the signal.
    """

    def __init__(self) -> None:
        self._signal = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives back to each the handler of before when the fit ends."""
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
        os.write(2, told.encode())  # nothing else may be written with from a handler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before a new step, with no gradients accumulated and no validation due: neither is in a checkpoint."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last step, before anything else is begun."""
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop in a validation during training, too, which may take longer than a scheduler waits."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Each process has an ear of its own, and all must stop in the same step.
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))
