"""User models. To add one, subclass `UserModel` in your own file and select it by `class_path`."""

from prlhf_lightning.user_models.amortized import AmortizedUserModel
from prlhf_lightning.user_models.base import UserModel, sample_token_embeddings
from prlhf_lightning.user_models.cluster import ClusterUserModel
from prlhf_lightning.user_models.composite import CompositeUserModel
from prlhf_lightning.user_models.individual import IndividualUserModel
from prlhf_lightning.user_models.low_rank import LowRankUserModel
from prlhf_lightning.user_models.text import TextUserModel
from prlhf_lightning.user_models.uniform import UniformUserModel

__all__ = [
    "AmortizedUserModel",
    "ClusterUserModel",
    "CompositeUserModel",
    "IndividualUserModel",
    "LowRankUserModel",
    "TextUserModel",
    "UniformUserModel",
    "UserModel",
    "sample_token_embeddings",
]
