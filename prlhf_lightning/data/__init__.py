"""Per-user preference feedback: from raw rows to padded batches."""

from prlhf_lightning.data.datamodule import PreferenceDataModule
from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.sources.feedback_log import FeedbackLogSource
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.data.sources.hub import HubSource
from prlhf_lightning.data.sources.simulated import SimulatedSource, StyleCorpus
from prlhf_lightning.data.users import UserVocabulary

__all__ = [
    "DataSource",
    "FeedbackLogSource",
    "FeedbackRecord",
    "FileSource",
    "HubSource",
    "PreferenceDataModule",
    "SimulatedSource",
    "StyleCorpus",
    "UserVocabulary",
]
