"""The sentence about what personalization gains."""

from __future__ import annotations

import numpy as np

from prlhf_lightning.metrics import UserAccuracy, UserAUC
from prlhf_lightning.reports.evaluation_table import Rows


def gain_sentence(own: Rows, generic: Rows) -> str | None:
    """Return whether users' own prompts rank their held-out pairs better than the generic user's, or None.

    The interval is the mean over users +/- 1.96 standard errors. It allows for the choice of users, and not for that of
    one shrinkage factor from the same pairs, whose effect is smaller (docs/adapt.md).

    Args:
        own: Each user's id and accuracy (for thumbs, the area under the curve).
        generic: The same rows, ranked by the generic user.
    """
    gains = 100 * np.array(
        [_value(row) - _value(other) for (_, row), (_, other) in zip(own, generic, strict=True)], dtype=float
    )
    gains = gains[np.isfinite(gains)]  # users with thumbs up alone have no area
    if len(gains) < 2:
        return None
    mean, half = float(gains.mean()), 1.96 * float(gains.std(ddof=1)) / len(gains) ** 0.5
    what = "pair accuracy" if isinstance(own[0][1], UserAccuracy) else "AUC"
    size = f"{mean:+.1f} ± {half:.1f} points of {what} against the generic user (held-out data, {len(gains):,} users)"
    if mean - half > 0:
        return f"Personalization gains: {size}."
    if mean + half < 0:
        return f"Personalization does harm: {size}."
    return f"Personalization gains nothing that the held-out data can show: {size}."


def _value(row: UserAccuracy | UserAUC) -> float:
    return row.accuracy if isinstance(row, UserAccuracy) else row.auc
