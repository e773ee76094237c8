"""Metrics that come out right over users, ragged batches and processes."""

from prlhf_lightning.metrics.degeneration import repeated_ngrams
from prlhf_lightning.metrics.preference import (
    PreferenceAccuracy,
    UserAccuracy,
    preference_accuracy,
    user_accuracies,
    wilson_interval,
)

__all__ = [
    "PreferenceAccuracy",
    "UserAccuracy",
    "preference_accuracy",
    "repeated_ngrams",
    "user_accuracies",
    "wilson_interval",
]
