"""Logging of learning rates, speed and memory."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from prlhf_lightning.types import PreferenceBatch

_GIB = 2**30
#: Names of the learning rates of the optimizer's groups, as in `model.optim`.
_RATES = {"policy": "lr", "user_model": "user_lr", "user_tables": "table_lr", "user_directions": "direction_lr"}


class TrainingStats(Callback):
    """Logs `train/lr`, `train/pairs_per_second` and others whenever values are logged.

    Speed covers the steps since the last log, over all processes, including waiting for data and excluding validation.
    Tokens are those of users' texts, prompts and completions, each counted once. Memory is the peak of this process, on
    its GPU if it has one, otherwise on the host.
    """

    def __init__(self) -> None:
        self._logged_at, self._since, self._paused = 0, 0.0, 0.0
        self._pairs = 0
        self._rates: dict[str, float] = {}
        self._tokens: torch.Tensor | int = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._logged_at = trainer.global_step
        self._forget()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the clock."""
        self._since += time.perf_counter() - self._paused

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the rates of this step: at its end, those of the next step are set."""
        self._rates = {_RATES.get(group.get("name", ""), "lr"): group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log at the end of an interval."""
        if isinstance(batch, PreferenceBatch) and len(batch):
            self._pairs += len(batch)
            parts = (batch.user_text, batch.prompt, batch.chosen, batch.rejected)
            self._tokens = self._tokens + sum(part.mask.sum() for part in parts)  # on the device: no synchronization
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._logged_at:
            return
        self._logged_at = step
        tokens = float(self._tokens)  # synchronizes, so that the time covers finished work
        seconds = time.perf_counter() - self._since
        values = {
            **self._rates,
            "pairs_per_second": self._pairs * trainer.world_size / seconds,
            "tokens_per_second": tokens * trainer.world_size / seconds,
            "peak_memory_gib": _peak_memory(pl_module.device) / _GIB,
        }
        for name, value in values.items():
            pl_module.log(f"train/{name}", value, rank_zero_only=True)
        self._forget()

    def _forget(self) -> None:
        self._since, self._pairs, self._tokens = time.perf_counter(), 0, 0


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in bytes; NaN if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)
    return float("nan")
