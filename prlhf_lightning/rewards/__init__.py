"""Explicit reward models for each user: a backbone's features of texts, and a head for each user."""

from prlhf_lightning.rewards.backbone import RewardBackbone
from prlhf_lightning.rewards.codes import estimate_codes
from prlhf_lightning.rewards.features import FeatureMap, TextFeatures
from prlhf_lightning.rewards.fitting import FittedHead, choose_precision, fit_codes, fit_head, pair_weights
from prlhf_lightning.rewards.model import RewardModel
from prlhf_lightning.rewards.pairs import JudgedPairs, TextTable

__all__ = [
    "FeatureMap",
    "FittedHead",
    "JudgedPairs",
    "RewardBackbone",
    "RewardModel",
    "TextFeatures",
    "TextTable",
    "choose_precision",
    "estimate_codes",
    "fit_codes",
    "fit_head",
    "pair_weights",
]
