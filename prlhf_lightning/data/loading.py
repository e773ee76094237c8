"""DataLoaders for a Lightning trainer, and what they must know of it."""

from __future__ import annotations

import os
import warnings
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from prlhf_lightning.data.collate import collate
from prlhf_lightning.errors import ConfigurationError

Loader: TypeAlias = DataLoader[dict[str, Any]]


def make_loader(rows: Dataset[dict[str, Any]], batches: Sampler[Any], num_workers: int, pin_memory: bool) -> Loader:
    """Return a loader of the batches that a sampler names.

    Args:
        rows: Gives the rows of a batch.
        batches: The batches of one process.
        num_workers: Processes that load them; none is the present one.
        pin_memory: Whether they are laid in pinned memory.
    """
    # Advice of Lightning's that does not apply: batches take well under a millisecond to load, the evaluation
    # sampler returns every row, and training resumes at the right batch.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
    warnings.filterwarnings("ignore", message=".*custom batch sampler `SequentialBatchSampler` for prediction")
    if num_workers:
        # Workers are forked after the tokenizer ran on threads; it would warn in each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def share_of(trainer: Trainer | None) -> tuple[int, int]:
    """Return rank and number of the processes that share the data (tensor-parallel ones count as one)."""
    kwargs = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


def resume_point(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch and the batch in it that a trainer, whose progress was restored if it resumes, runs next."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epoch.processed == epoch.ready:  # between epochs
        return epoch.processed, 0
    # A batch that was interrupted is run again; one whose checkpoint was saved as it ended is not.
    if batch.processed != batch.ready:
        return epoch.processed, batch.completed
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return epoch.processed + 1, 0
    return epoch.processed, batch.processed


def refuse_injected_sampler(trainer: Trainer) -> None:
    """Refuse a trainer that would put a sampler of its own in the place of ours.

    Raises:
        ConfigurationError: Names the setting.
    """
    connector = trainer._accelerator_connector  # the setting has no public name
    if connector.use_distributed_sampler and connector.is_distributed:
        raise ConfigurationError(
            "The trainer would replace the sampler that groups pairs by user, which divides the data over processes "
            "itself; set trainer.use_distributed_sampler: false."
        )
