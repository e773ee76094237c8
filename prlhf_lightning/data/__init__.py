"""Per-user preference feedback: from raw rows to padded batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prlhf_lightning.data.privacy import Pseudonyms
from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.sources.combined import CombinedSource
from prlhf_lightning.data.sources.derived import DerivedSource
from prlhf_lightning.data.sources.feedback_log import FeedbackLogSource
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.data.sources.hh_rlhf import HHRLHFSource
from prlhf_lightning.data.sources.hub import HubSource
from prlhf_lightning.data.sources.personal_llm import PersonalLLMSource
from prlhf_lightning.data.sources.personalized_soups import PersonalizedSoupsSource
from prlhf_lightning.data.sources.pool import PoolSource
from prlhf_lightning.data.sources.prism import PRISMSource
from prlhf_lightning.data.sources.ratings import LabelSource, RankingSource, RatingSource
from prlhf_lightning.data.sources.simulated import SimulatedSource, StyleCorpus
from prlhf_lightning.data.sources.tldr import TLDRSource
from prlhf_lightning.data.sources.ultrafeedback_p import UltraFeedbackPSource
from prlhf_lightning.data.users import UserVocabulary

if TYPE_CHECKING:
    from prlhf_lightning.data.datamodule import PreferenceDataModule

__all__ = [
    "CombinedSource",
    "DataSource",
    "DerivedSource",
    "FeedbackLogSource",
    "FeedbackRecord",
    "FileSource",
    "HHRLHFSource",
    "HubSource",
    "LabelSource",
    "PRISMSource",
    "PersonalLLMSource",
    "PersonalizedSoupsSource",
    "PoolSource",
    "PreferenceDataModule",
    "Pseudonyms",
    "RankingSource",
    "RatingSource",
    "SimulatedSource",
    "StyleCorpus",
    "TLDRSource",
    "UltraFeedbackPSource",
    "UserVocabulary",
]


def __getattr__(name: str) -> Any:
    """Import the data module when it is first used: it needs Lightning, which writing with a model does not."""
    if name != "PreferenceDataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.datamodule"), name)
