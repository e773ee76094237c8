"""Metrics that come out right over users, ragged batches and processes."""

from prlhf_lightning.metrics.degeneration import repeated_ngrams
from prlhf_lightning.metrics.preference import (
    PreferenceAccuracy,
    UserAccuracy,
    preference_accuracy,
    user_accuracies,
    wilson_interval,
)
from prlhf_lightning.metrics.unpaired import ThumbsAUC, UserAUC, thumbs_auc, user_aucs

__all__ = [
    "PreferenceAccuracy",
    "ThumbsAUC",
    "UserAUC",
    "UserAccuracy",
    "preference_accuracy",
    "repeated_ngrams",
    "thumbs_auc",
    "user_accuracies",
    "user_aucs",
    "wilson_interval",
]
