"""Base class of losses that keep a running mean across calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, distributed

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses.base import PreferenceLoss


class RunningShiftLoss(PreferenceLoss):
    """Base class of losses that compare rewards with a running mean.

    It is an exponential moving average over about the last `window` rows of all processes. Each call uses the mean of
    the earlier calls, so a row's loss does not depend on the other rows of its batch. Other (micro-)batch sizes change
    the mean only through the order of rows within a batch. User and generic terms share one mean. It starts at 0, about
    the reward of an untrained policy, and changes only in training mode. It is part of the state dict, because a
    resumed run needs it.

    In training under `torch.distributed` each update is a collective: all processes must call it.

    Args:
        beta: Scale of the implicit rewards; the larger, the closer the policy stays to the reference.
        window: Number of recent rows, over all processes, in the running mean.
        sft_weight: Weight of the negative log-likelihood per token of the chosen completion, added to every pair.
    """

    shift: Tensor
    pairs_seen: Tensor

    def __init__(self, beta: float = 0.1, window: int = 1000, sft_weight: float = 0.0) -> None:
        super().__init__(beta, sft_weight)
        if window < 1:
            raise ConfigurationError(f"{type(self).__name__}: window is {window}; the running mean needs at least 1.")
        self.window = window
        self.register_buffer("shift", torch.zeros((), dtype=torch.float32))
        self.register_buffer("pairs_seen", torch.zeros((), dtype=torch.int64))

    def update_shift(self, values: Tensor) -> None:
        """Update the running mean with values `[B]`, with equal weight for each row."""
        batch = torch.stack([values.sum(), values.new_full((), len(values))]).to(torch.float32)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(batch)
        total, rows = batch
        self.pairs_seen += rows.long()
        decay = 1 - 1 / self.window
        # The denominator corrects the bias of the initial 0, as in Adam.
        weight = (1 - decay**rows) / (1 - decay**self.pairs_seen).clamp(min=1e-12)
        self.shift += weight * (total / rows.clamp(min=1) - self.shift)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the running mean in float32 under any cast: bfloat16 would round its small steps away."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shift = self.shift.to(torch.float32)
        return self
