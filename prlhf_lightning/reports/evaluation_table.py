"""The console table of an evaluation: each value with its count and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from rich import box
from rich.table import Table
from torch import Tensor

from prlhf_lightning.analysis.personalization_gain import bootstrap
from prlhf_lightning.metrics import UserAccuracy, UserAUC

Rows: TypeAlias = Sequence[tuple[str, UserAccuracy | UserAUC]]

_VALUES = {
    "generic_accuracy": "  same pairs, generic user",
    "accuracy_worst_decile": "  worst tenth of users",
    "generic_auc": "  same thumbs, generic user",
    "auc_worst_decile": "  worst tenth of users",
    "reward": "reward of answers, mean over users",
    "generic_reward": "  same prompts, generic user",
    "reward_worst_decile": "  worst tenth of users",
    "margin": "margin of rewards",
    "loss": "loss",
}


def evaluation_table(
    metrics: Mapping[str, Tensor], users: Mapping[str, Rows], sets: Sequence[str], stage: str
) -> Table:
    """Return a table with a column for each set.

    Intervals are 95% bootstraps over users; a single user has none.

    Args:
        metrics: Logged values by name, such as `val/seen/accuracy`.
        users: Each user's row, by set.
        sets: The sets, such as seen and unseen users.
        stage: Prefix of the logged values: `val` or `test`.
    """
    title = "Validation" if stage == "val" else "Test"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    columns = []
    for name in sets:
        table.add_column(f"{name} users", justify="right")
        counted = _counted(users.get(name, ()))
        prefix = f"{stage}/{name}/"
        logged = {
            label: f"{float(metrics[prefix + key]):.4f}" for key, label in _VALUES.items() if prefix + key in metrics
        }
        columns.append(counted | logged)
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "") for column in columns))
    if any("[" in value for column in columns for value in column.values()):
        table.caption = "[ ]: 95% intervals, over users"
    return table


def _counted(rows: Rows) -> dict[str, str]:
    """Return per-user values: the number of users, and means with their intervals."""
    found = {"users": f"{len(rows):,}"} if rows else {}
    pairs = [row for _, row in rows if isinstance(row, UserAccuracy)]
    if pairs:
        counts = np.array([row.pairs for row in pairs], dtype=float)
        shares = np.array([row.accuracy for row in pairs])
        found["pairs"] = f"{int(counts.sum()):,}"
        found["pair accuracy"] = _with_interval(shares * counts, counts)
        found["  mean over users"] = _with_interval(shares, np.ones_like(shares))
    thumbs = [row for _, row in rows if isinstance(row, UserAUC)]
    if thumbs:
        found["thumbs up, down"] = f"{sum(row.ups for row in thumbs):,}, {sum(row.downs for row in thumbs):,}"
        areas = np.array([row.auc for row in thumbs if row.auc == row.auc])
        if len(areas):
            found["AUC of thumbs, mean over users"] = _with_interval(areas, np.ones_like(areas))
    return found


def _with_interval(sums: np.ndarray, counts: np.ndarray) -> str:
    value = f"{sums.sum() / counts.sum():.3f}"
    if len(counts) < 2 or not np.isfinite(sums).all():
        return value
    low, high = bootstrap(sums, counts)
    return f"{value} [{low:.3f}, {high:.3f}]"
