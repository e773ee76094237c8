"""Where in the training loop a checkpoint goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def end_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Have a checkpoint that was saved at the very end of an epoch go on with the next one.

    Lightning (2.6.6) saves there when nothing is validated, before it counts the epoch as completed. Going on from it
    under a limit of steps (`max_steps`), it trains on one batch and takes that for the whole of the next epoch.

    Args:
        checkpoint: What the file holds; the state of its fit loop is changed.
    """
    loop: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch = loop.get("epoch_progress")
    if not epoch or not epoch["current"]["completed"] < epoch["current"]["processed"] == epoch["current"]["ready"]:
        return
    for count in epoch.values():
        count["completed"] = count["processed"]
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    for name in ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress"):
        _begin_anew(loop[f"epoch_loop.{name}"])


def _begin_anew(progress: dict[str, Any]) -> None:
    """Set the counts of the present epoch to zero; those of the whole run stay."""
    for name, value in progress.items():
        if name == "current":
            progress[name] = dict.fromkeys(value, 0)
        elif isinstance(value, dict):
            _begin_anew(value)
