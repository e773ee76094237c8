"""`RewardModel`: backbone, features and user model together, without Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards.backbone import RewardBackbone
from prlhf_lightning.rewards.features import FeatureMap, TextFeatures
from prlhf_lightning.rewards.fitting import IndexedPairs, fit_codes
from prlhf_lightning.rewards.pairs import JudgedPairs, TextTable
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import LowRankUserModel, UserModel

_AT_ONCE = 1 << 10
_STEPS_OF_NEW_USERS = 20


class KeepsVectors(Protocol):
    """Store of the backbone's vectors of texts."""

    def vectors(self, texts: TextTable, backbone: RewardBackbone) -> Tensor:
        """Return the vectors `[T, d]` of texts, computed by the backbone only if they are not stored."""


class RewardModel(nn.Module):
    """A reward for each user: `r(x, y, u) = (w_0 + o_u) · φ(x, y)`.

    The user model's vector of a user, of which there is one, is the head. So `LowRankUserModel` gives LoRe
    (arXiv:2504.14439), `ClusterUserModel` the prototypes of PAL (arXiv:2406.08469), `IndividualUserModel` a head
    for each user, and `UniformUserModel` a reward model without users.

    Args:
        user_model: Maps users to heads.
        backbone: Maps texts to vectors.

    Attributes:
        features: Maps these vectors to features.
        vocabulary: The users with a row in the user model; None before training.
        store: Keeps vectors; None computes them at each call.
    """

    def __init__(self, user_model: UserModel, backbone: RewardBackbone) -> None:
        super().__init__()
        if user_model.uses_text or user_model.history_size:
            raise ConfigurationError(
                f"user_model: {type(user_model).__name__} reads texts or pairs, which a head does not have; use "
                "LowRankUserModel, ClusterUserModel, IndividualUserModel or UniformUserModel."
            )
        if getattr(user_model, "num_tokens", 1) != 1:
            raise ConfigurationError(
                f"user_model.num_tokens is {user_model.num_tokens}; a user has one head: set num_tokens: 1."
            )
        self.user_model = user_model
        self.backbone = backbone
        self.features = FeatureMap()
        self.vocabulary: UserVocabulary | None = None
        self.store: KeepsVectors | None = None

    def features_of(self, texts: TextTable) -> TextFeatures:
        """Return the features of texts."""
        found: TextFeatures = self.features(self.vectors(texts), texts)
        return found

    def vectors(self, texts: TextTable) -> Tensor:
        """Return the backbone's vectors of texts, `[T, d]`."""
        if self.store is not None:
            return self.store.vectors(texts, self.backbone)
        found: Tensor = self.backbone(texts.prompts, texts.completions)
        return found

    def heads(self, rows: Tensor, generic: bool = False) -> Tensor:
        """Return the heads of users, `[n, D]`; of the generic user in their place, if `generic`."""
        users = Users(rows)
        prompt = self.user_model.generic(users) if generic else self.user_model(users)
        head: Tensor = prompt.vectors.sum(1)
        return head

    @torch.no_grad()
    def rewards(self, features: TextFeatures, rows: Tensor, texts: Tensor, generic: bool = False) -> Tensor:
        """Return the rewards of texts for users, `[n]` float32.

        Args:
            features: Features of T texts.
            rows: `[n]` rows of the users; 0 is the generic user.
            texts: `[n]` numbers of the texts.
            generic: Whether the generic user replaces each user.
        """
        parts = zip(torch.split(rows, _AT_ONCE), torch.split(texts, _AT_ONCE), strict=True)
        found = [(self.heads(users, generic) * features.dense(index)).sum(1) for users, index in parts]
        return torch.cat(found) if found else features.vectors.new_zeros(0)

    def rows_of(self, user_ids: Sequence[str]) -> Tensor:
        """Return the rows of users, `[n]`; 0 for unknown ones, who fall back to the generic user.

        Raises:
            ConfigurationError: The model has no users yet.
        """
        if self.vocabulary is None:
            raise ConfigurationError("The users are not known yet: train the model or load a checkpoint first.")
        return self.vocabulary.rows(user_ids).to(self.features.means.device)

    @torch.no_grad()
    def linear_margins(self, pairs: JudgedPairs) -> tuple[Tensor, Tensor]:
        """Return pairs' margins as functions of a user's code: at code 0, `[N]`, and their derivatives, `[N, k]`.

        Raises:
            ConfigurationError: The user model has no codes.
        """
        model = self.user_model
        if not isinstance(model, LowRankUserModel):
            raise ConfigurationError(f"{type(model).__name__} has no codes to learn; train a LowRankUserModel.")
        scores = self.features_of(pairs.texts).scores(torch.cat([model.generic_prompt, model.basis]).T)
        margins = scores[pairs.chosen] - scores[pairs.rejected]
        return margins[:, 0], margins[:, 1:]

    @torch.no_grad()
    def new_users(
        self, pairs: JudgedPairs, linear: tuple[Tensor, Tensor] | None = None
    ) -> tuple[UserVocabulary, Tensor, Tensor]:
        """Return codes of new users, learned from their pairs with everything else frozen.

        The prior `N(0, I)` is the one of training, so nothing needs to be fitted first.

        Args:
            pairs: Pairs of new users.
            linear: Their `linear_margins`, if known.

        Returns:
            The users (row 0 is the generic one), the means `[U, k]` and the covariances `[U, k, k]` of their codes.

        Raises:
            ConfigurationError: The user model has no codes.
        """
        generic, slopes = self.linear_margins(pairs) if linear is None else linear
        users = UserVocabulary(dict.fromkeys(pairs.user_ids))
        chosen, rejected = (texts.to(slopes.device) for texts in (pairs.chosen, pairs.rejected))
        indexed = IndexedPairs.weighted(users.rows(pairs.user_ids).to(slopes.device), chosen, rejected)
        rank = slopes.shape[1]
        prior = torch.eye(rank, device=slopes.device).expand(len(users), -1, -1)
        codes = slopes.new_zeros(len(users), rank)
        return users, *fit_codes(generic, slopes, indexed, codes, prior, _STEPS_OF_NEW_USERS)
