"""Small models of votes, with one score an item that all users share, and without or with what a user adds to it.

They see who voted on which items, not a text, and fit in seconds: a yardstick of what there is to personalize. N votes
by U users on I items; K dimensions of taste.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from prlhf_lightning.analysis.votes import Floats, Votes

_ITERATIONS = 100


@dataclass(frozen=True)
class PreferenceModel:
    """Margins `s_w - s_l + <t_u, v_w - v_l>` of the winner w over the loser l for user u.

    Attributes:
        scores: `[I]` float64, what all users make of each item (Bradley & Terry 1952).
        tastes: `[U, K]` float64, what each user adds.
        items: `[I, K]` float64, the items in the same dimensions.
    """

    scores: Tensor
    tastes: Tensor
    items: Tensor

    def margins(self, votes: Votes) -> Tensor:
        """Return `[N]` by how much each vote's winner is ahead, as log-odds."""
        users, winners, losers = (torch.from_numpy(part) for part in (votes.users, votes.winners, votes.losers))
        shared = embedding(winners, self.scores[:, None]) - embedding(losers, self.scores[:, None])
        if not self.tastes.shape[1]:
            return shared[:, 0]
        own = embedding(users, self.tastes) * (embedding(winners, self.items) - embedding(losers, self.items))
        return shared[:, 0] + own.sum(1)

    def truncated(self, rank: int) -> PreferenceModel:
        """Return the model with the best approximation of lower rank of what users add, both factors of one size."""
        left, left_factor = torch.linalg.qr(self.tastes)
        right, right_factor = torch.linalg.qr(self.items)
        u, sizes, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
        root = sizes[:rank].sqrt()
        return PreferenceModel(self.scores, left @ u[:, :rank] * root, right @ v[:rank].T * root)


class PreferenceFamily(ABC):
    """Models of one kind, which cross-validation chooses among.

    Attributes:
        shared_ridges: Penalties of what users share, to choose from.
        ranks: Dimensions of taste, to choose from, the largest first.
    """

    shared_ridges: Sequence[float]
    ranks: Sequence[int]

    @abstractmethod
    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Fit what all users share."""

    @abstractmethod
    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return penalties of what a user adds, the weakest first; under the last next to nothing of it is left."""

    @abstractmethod
    def personal(
        self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float, rank: int
    ) -> PreferenceModel:
        """Fit both what users share and what each adds, from a model with less or with more of a taste."""


class ItemPreferences(PreferenceFamily):
    """A free score an item, and a free low-rank term of users and items.

    The penalty `ridge / 2 * (|t|² + |v|²)` on the two factors is that of the trace norm of their product (Srebro et al.
    2004), so that the ridge, rather than the rank, decides how much of a taste is kept.

    Args:
        seed: Draws the weights that are started from.
    """

    shared_ridges = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    ranks = (8, 4, 2, 1)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Fit a Bradley-Terry score an item."""
        start = PreferenceModel(*(torch.zeros(size, dtype=torch.float64) for size in _sizes(votes, 0)))
        return self._fitted(votes, start, ridge, 0.0)

    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return shares of the ridge from which on there is no low-rank term.

        That is the largest singular value of the matrix `[U, I]` of the residuals of the votes, up to a sign.
        """
        residuals = torch.sigmoid(-shared.margins(votes))
        users, winners, losers = (torch.from_numpy(part) for part in (votes.users, votes.winners, votes.losers))
        vector = torch.randn(votes.num_items, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
        largest = vector.new_zeros(())
        for _ in range(50):  # power iterations
            vector = vector / vector.norm().clamp(min=1e-12)
            by_user = vector.new_zeros(votes.num_users)
            by_user.index_add_(0, users, residuals * (vector[winners] - vector[losers]))
            largest = by_user.norm()
            pull = residuals * by_user[users]
            vector = torch.zeros_like(vector).index_add_(0, winners, pull).index_add_(0, losers, -pull)
        return [share * max(float(largest), 1e-3) for share in (0.2, 0.3, 0.4, 0.55, 0.75, 1.0)]

    def personal(
        self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float, rank: int
    ) -> PreferenceModel:
        """Fit scores and the low-rank term."""
        if start.tastes.shape[1] < rank:  # nothing to start from: at zero there is no slope
            draw = torch.Generator().manual_seed(self.seed)
            factors = (0.1 * torch.randn(s, generator=draw, dtype=torch.float64) for s in _sizes(votes, rank)[1:])
            start = PreferenceModel(start.scores, *factors)
        elif start.tastes.shape[1] > rank:
            start = start.truncated(rank)
        return self._fitted(votes, start, shared_ridge, ridge)

    def _fitted(self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float) -> PreferenceModel:
        weights = [start.scores.clone(), start.tastes.clone(), start.items.clone()]
        model, penalties = PreferenceModel(*weights), (shared_ridge, ridge, ridge)

        def objective() -> tuple[float, list[Tensor]]:
            loss, slopes = _loss_and_slopes(model, votes)
            loss += sum(penalty / 2 * float(w.square().sum()) for penalty, w in zip(penalties, weights, strict=True))
            return loss, [slope + penalty * w for slope, penalty, w in zip(slopes, penalties, weights, strict=True)]

        _minimise(weights, objective, len(votes))
        return model


class FeaturePreferences(PreferenceFamily):
    """Weights of an item's features that all users share, and what each user adds to each weight.

    For items that only one user has seen: what can be known of them is what their features say.

    Args:
        features: `[I, K]` float64; scale them, since one penalty is for all.
    """

    shared_ridges = (0.1, 1.0, 10.0, 100.0)

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.ranks = (features.shape[1],)

    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Fit a weight a feature, by ridge logistic regression."""
        nothing = PreferenceModel(*(torch.zeros(size, dtype=torch.float64) for size in _sizes(votes, 0)))
        return self._fitted(votes, nothing, ridge, 0.0)

    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return inverse variances of a user's weights around the shared ones: a standard deviation of 1 to 0.03."""
        return [1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]

    def personal(
        self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float, rank: int
    ) -> PreferenceModel:
        """Fit shared weights and each user's deviations from them, which are shrunk towards none."""
        if not start.tastes.shape[1]:
            tastes = start.scores.new_zeros(votes.num_users, self.features.shape[1])
            start = PreferenceModel(start.scores, tastes, self.features)
        return self._fitted(votes, start, shared_ridge, ridge)

    def _fitted(self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float) -> PreferenceModel:
        shared = torch.linalg.lstsq(self.features, start.scores[:, None], driver="gelsd").solution[:, 0]
        weights, penalties = [shared, start.tastes.clone()], (shared_ridge, ridge)

        def model() -> PreferenceModel:
            return PreferenceModel(self.features @ weights[0], weights[1], start.items)

        def objective() -> tuple[float, list[Tensor]]:
            loss, (by_score, by_taste, _) = _loss_and_slopes(model(), votes)
            loss += sum(penalty / 2 * float(w.square().sum()) for penalty, w in zip(penalties, weights, strict=True))
            slopes = [self.features.T @ by_score, by_taste]
            return loss, [slope + penalty * w for slope, penalty, w in zip(slopes, penalties, weights, strict=True)]

        _minimise(weights, objective, len(votes))
        return model()


def _sizes(votes: Votes, rank: int) -> list[tuple[int, ...]]:
    """Return the shapes of a `PreferenceModel`."""
    return [(votes.num_items,), (votes.num_users, rank), (votes.num_items, rank)]


def _loss_and_slopes(model: PreferenceModel, votes: Votes) -> tuple[float, list[Tensor]]:
    """Return the log-loss, and its gradients by scores, tastes and items.

    Written out, a dimension at a time, since counting with weights is five times as fast as what autograd does.
    """
    scores, tastes, items = (
        model.scores.numpy(),
        model.tastes.T.contiguous().numpy(),
        model.items.T.contiguous().numpy(),
    )
    users, winners, losers = votes.users, votes.winners, votes.losers
    own = [taste[users] for taste in tastes]
    ahead = [item[winners] - item[losers] for item in items]
    margins = scores[winners] - scores[losers]
    for part, difference in zip(own, ahead, strict=True):
        margins += part * difference
    pull = -0.5 * (1 - np.tanh(margins / 2))  # minus the probability of the opposite vote
    by_score = _by_item(pull, votes)
    by_taste, by_item = torch.empty_like(model.tastes), torch.empty_like(model.items)
    for k, (part, difference) in enumerate(zip(own, ahead, strict=True)):
        by_taste[:, k] = torch.from_numpy(np.bincount(users, pull * difference, votes.num_users))
        by_item[:, k] = _by_item(pull * part, votes)
    return float(np.logaddexp(0, -margins).sum()), [by_score, by_taste, by_item]


def _by_item(values: Floats, votes: Votes) -> Tensor:
    """Return `[I]` the sum of values of the votes that an item won, less that of those it lost."""
    won, lost = (np.bincount(items, values, votes.num_items) for items in (votes.winners, votes.losers))
    return torch.from_numpy(won - lost)


def _minimise(weights: list[Tensor], objective: Callable[[], tuple[float, list[Tensor]]], votes: int) -> None:
    """Minimize a smooth function, that comes with its gradients, of some weights, in place."""
    # What a vote gains in a step below the tolerance, no held-out vote will tell.
    optimizer = torch.optim.LBFGS(
        weights, max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-4, tolerance_change=1e-7 * votes
    )

    def closure() -> float:
        loss, slopes = objective()
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    for weight in weights:
        weight.grad = None
