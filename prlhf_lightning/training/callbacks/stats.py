"""How training goes, beside its metrics: learning rates, speed and memory."""

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
#: What the rates of the optimizer's groups are called, as in `model.optim`.
_RATES = {"policy": "lr", "user_model": "user_lr", "user_tables": "table_lr"}


class TrainingStats(Callback):
    """Logs `train/lr`, `train/pairs_per_second` and the like, whenever values are logged.

    Speed is that of the steps since values were last logged, over all processes, waiting for data included and
    validation left out. Tokens are those of users' texts, prompts and completions, each counted once. Memory is the
    most that this process has taken, on its GPU if it has one, else on the host.
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
        """Go on with the clock."""
        self._since += time.perf_counter() - self._paused

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the rates of this step: when it ends, those of the next are set."""
        self._rates = {_RATES.get(group.get("name", ""), "lr"): group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log at the end of an interval."""
        if isinstance(batch, PreferenceBatch) and len(batch):
            self._pairs += len(batch)
            parts = (batch.user_text, batch.prompt, batch.chosen, batch.rejected)
            self._tokens = self._tokens + sum(part.mask.sum() for part in parts)  # on the device: nobody waits for it
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._logged_at:
            return
        self._logged_at = step
        tokens = float(self._tokens)  # waits for the device, so that the time is that of finished work
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
    """Return the most bytes that this process has taken so far; NaN where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)
    return float("nan")
