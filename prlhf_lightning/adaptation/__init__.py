"""Adaptation: rows of new users from a handful of pairs, and selection of the next pairs to ask."""

from prlhf_lightning.adaptation.adapt import Adapted, Encoded, adapt_users, encode_users, fit_prior, trained_rows
from prlhf_lightning.adaptation.cold_start import ColdStartPoint, cold_start, information_gain, suggest
from prlhf_lightning.adaptation.heads import AdaptedHeads, adapt_heads, cold_start_heads, suggest_pairs
from prlhf_lightning.adaptation.laplace import Posterior, laplace
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.adaptation.shrink_users import ShrinkUsers
from prlhf_lightning.adaptation.shrinkage import Shrinkage, fit_shrinkage
from prlhf_lightning.types import select_pairs

__all__ = [
    "Adapted",
    "AdaptedHeads",
    "ColdStartPoint",
    "Encoded",
    "Margins",
    "Posterior",
    "ShrinkUsers",
    "Shrinkage",
    "UserPrior",
    "adapt_heads",
    "adapt_users",
    "cold_start",
    "cold_start_heads",
    "encode_users",
    "fit_prior",
    "fit_shrinkage",
    "information_gain",
    "laplace",
    "select_pairs",
    "suggest",
    "suggest_pairs",
    "trained_rows",
]
