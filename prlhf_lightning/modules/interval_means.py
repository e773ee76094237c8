"""Means of what is logged in training, over all rows since it was logged last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from prlhf_lightning.modules.processes import sum_over_processes

Share: TypeAlias = tuple[Tensor, Tensor]
"""The sum `[]` of a value over rows, and the number `[]` of these rows."""


class IntervalMeans:
    """Adds up batches until a mean is logged: of all micro-batches, steps and processes of the interval."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [2] each: sum and number of rows

    def add(self, shares: Mapping[str, Share]) -> None:
        """Add a batch."""
        for name, share in shares.items():
            added = torch.stack([part.detach().float() for part in share])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def means(self, trainer: Trainer | None = None) -> dict[str, Tensor]:
        """Return the means of the rows since the last reset, each `[]`; NaN where there were none.

        Args:
            trainer: Where given, over all its processes, which all must call this.
        """
        sums = torch.stack(list(self._sums.values()))
        if trainer is not None and trainer.world_size > 1:
            sums = sum_over_processes(trainer, sums)
        total, rows = sums.unbind(1)
        return dict(zip(self._sums, total / rows, strict=True))

    def reset(self, sums: Mapping[str, Tensor] | None = None) -> None:
        """Begin a new interval, or go on with one that `sums` were added up in."""
        self._sums = dict(sums or {})

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Sum and number of rows `[2]` of each value since the last reset, in this process."""
        return self._sums


def is_logged_now(trainer: Trainer) -> bool:
    """Whether Lightning will log what a training step of this batch gives: at an interval's last micro-batch."""
    ends_step = not trainer.fit_loop._should_accumulate()
    return ends_step and (trainer._logger_connector.should_update_logs or bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
