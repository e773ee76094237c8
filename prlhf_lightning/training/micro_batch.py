"""Helpers for one micro-batch: random seed, weight in the optimizer step, position of rows, logged means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from prlhf_lightning.data.sampling import UserGroupedBatchSampler
from prlhf_lightning.data.streaming import StreamBatchSampler
from prlhf_lightning.metrics.preference import pair_scores
from prlhf_lightning.training.distributed import stable_hash, sum_over_processes
from prlhf_lightning.training.objective import Term
from prlhf_lightning.types import Feedback, LogProbs
from prlhf_lightning.utils import lightning_compat


def seed_randomness(seed: int | None, trainer: Trainer, batch_idx: int) -> None:
    """Seed randomness (dropout, sampled terms) from seed, process and batch, so that interruptions do not matter."""
    draw = f"{seed} {trainer.global_rank} {trainer.current_epoch} {batch_idx}"
    torch.manual_seed(stable_hash(draw))


def batch_weight(trainer: Trainer, pairs: int, batch_idx: int) -> float:
    """Return a batch's number of pairs, divided by the mean over the batches of its step and all processes.

    Lightning averages over accumulated batches, and DDP over processes, without regard to their sizes. The sampler
    knows all sizes of the epoch, so no communication is needed. An accumulation window cut short by the end of the
    epoch is also a mean over its own pairs.

    Args:
        trainer: The trainer.
        pairs: Number of pairs of the batch, on this process.
        batch_idx: Its number in the epoch.
    """
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, UserGroupedBatchSampler | StreamBatchSampler):
        return 1.0  # batches of another data module
    window = trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % window
    step = slice(first, min(first + window, int(trainer.num_training_batches)))
    return pairs * window / sampler.pairs_per_rank(trainer.current_epoch, step)


def describe_row(trainer: Trainer, record: int) -> str:
    """Return the file and line of a row of the current stage, given its number in `PreferenceBatch.records`."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    stage = "train" if trainer.training else "test" if trainer.testing else "validate"
    return str(datamodule.where(record, stage)) if hasattr(datamodule, "where") else f"row {record}"


def sums_to_log(losses: Tensor, term: Term, feedback: Feedback, writes: bool = True) -> dict[str, Share]:
    """Return the sums of logged values over a batch, each with the number of rows that have the value.

    Args:
        losses: `[B]` the losses.
        term: The first term of the objective.
        feedback: Kind of rows.
        writes: Whether the policy writes; the log-probs of a reward model are rewards.
    """
    chosen, rejected = term.log_probs.chosen, term.log_probs.rejected
    sums = {"loss": _sum(losses)}
    if writes:
        sums["chosen_log_probs"] = _sum(chosen.sum, chosen)
    if term.reference is not None:
        sums["chosen_log_ratio"] = _sum(chosen.mean - term.reference.chosen.mean, chosen)  # per token
    if writes and feedback != "demonstrations":
        sums["rejected_log_probs"] = _sum(rejected.sum, rejected)
    if feedback == "thumbs" or not writes:
        sums["chosen_rewards"] = _sum(term.output.chosen_rewards, chosen)
        sums["rejected_rewards"] = _sum(term.output.rejected_rewards, rejected)
    if feedback == "pairs":
        sums["margin"] = _sum(term.margins)
        sums["accuracy"] = _sum(pair_scores(term.output.chosen_rewards, term.output.rejected_rewards))
    return sums


def _sum(values: Tensor, of: LogProbs | None = None) -> Share:
    """Return the sum of values `[B]` over the rows with such a completion, and the number of these rows."""
    present = torch.ones_like(values, dtype=torch.bool) if of is None else of.mask.any(-1)
    return torch.where(present, values.detach(), 0.0).sum(), present.sum()


Share: TypeAlias = tuple[Tensor, Tensor]
"""The sum `[]` of a value over rows, and the number `[]` of these rows."""


class IntervalMeans:
    """Accumulates sums for logged means over all micro-batches, steps and processes of an interval."""

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
            trainer: If given, means are over all its processes, and all must call this.
        """
        sums = torch.stack(list(self._sums.values()))
        if trainer is not None and trainer.world_size > 1:
            sums = sum_over_processes(trainer, sums)
        total, rows = sums.unbind(1)
        return dict(zip(self._sums, total / rows, strict=True))

    def reset(self, sums: Mapping[str, Tensor] | None = None) -> None:
        """Start a new interval, or continue one with these `sums`."""
        self._sums = dict(sums or {})

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Sum and number of rows `[2]` of each value since the last reset, in this process."""
        return self._sums


def is_logged_now(trainer: Trainer) -> bool:
    """Return whether Lightning will log in this training step: at an interval's last micro-batch."""
    return lightning_compat.ends_optimizer_step(trainer) and lightning_compat.logs_this_step(trainer)
