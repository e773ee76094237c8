"""Numbers in words, for pages and what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prlhf_lightning.analysis.win_rate import UserMean
from prlhf_lightning.reports.json_file import number

ALIKE = {False: "The model does not tell users apart.", True: "The model knows users by their texts alone."}


def mean_of(content: Mapping[str, Any]) -> UserMean:
    """Return a mean over users from its JSON."""
    value, low, high = (number(content[name]) for name in ("value", "low", "high"))
    return UserMean(value, low, high, content["users"], content["count"])


def points(gain: UserMean) -> str:
    """Return a change of accuracy and its interval, in points."""
    return f"{100 * gain.value:+.1f} points ({interval(gain, '+.1f', 100)})"


def interval(mean: UserMean, form: str, scale: float = 1) -> str:
    """Return an interval, each end in a format."""
    if mean.low != mean.low:
        return "one user, so no interval"
    return f"{scale * mean.low:{form}} to {scale * mean.high:{form}}"
