"""Metrics over users, exact with ragged batches and several processes."""

from prlhf_lightning.metrics.degeneration import repeated_ngrams
from prlhf_lightning.metrics.preference import (
    PreferenceAccuracy,
    UserAccuracy,
    preference_accuracy,
    user_accuracies,
    wilson_interval,
)
from prlhf_lightning.metrics.unpaired import UnpairedAUC, UserAUC, unpaired_auc, user_aucs

__all__ = [
    "PreferenceAccuracy",
    "UnpairedAUC",
    "UserAUC",
    "UserAccuracy",
    "preference_accuracy",
    "repeated_ngrams",
    "unpaired_auc",
    "user_accuracies",
    "user_aucs",
    "wilson_interval",
]
