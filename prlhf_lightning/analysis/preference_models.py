"""Small models of votes: one score per item that all users share, optionally with a user-specific term.

They see who voted on which items, but no text, and fit in seconds. N votes by U users on I items; K dimensions of
preference.
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
        scores: `[I]` float64, shared score of each item (Bradley & Terry 1952).
        tastes: `[U, K]` float64, preference vector of each user.
        items: `[I, K]` float64, the items in the same dimensions.
    """

    scores: Tensor
    tastes: Tensor
    items: Tensor

    def margins(self, votes: Votes) -> Tensor:
        """Return `[N]` the margin of each vote's winner, in log-odds."""
        users, winners, losers = (torch.from_numpy(part) for part in (votes.users, votes.winners, votes.losers))
        shared = embedding(winners, self.scores[:, None]) - embedding(losers, self.scores[:, None])
        if not self.tastes.shape[1]:
            return shared[:, 0]
        own = embedding(users, self.tastes) * (embedding(winners, self.items) - embedding(losers, self.items))
        return shared[:, 0] + own.sum(1)

    def truncated(self, rank: int) -> PreferenceModel:
        """Return the model with the best low-rank approximation of the user term, with balanced factors."""
        left, left_factor = torch.linalg.qr(self.tastes)
        right, right_factor = torch.linalg.qr(self.items)
        u, sizes, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
        root = sizes[:rank].sqrt()
        return PreferenceModel(self.scores, left @ u[:, :rank] * root, right @ v[:rank].T * root)


class PreferenceFamily(ABC):
    """A family of models for cross-validation.

    Attributes:
        shared_ridges: Candidate penalties of the shared part.
        ranks: Candidate dimensions of preference, largest first.
    """

    shared_ridges: Sequence[float]
    ranks: Sequence[int]

    @abstractmethod
    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Return the fitted shared model."""

    @abstractmethod
    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return candidate penalties of the user term, weakest first; the last one removes nearly all of it."""

    @abstractmethod
    def personal(
        self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float, rank: int
    ) -> PreferenceModel:
        """Return the fitted shared and user terms, starting from a model with a stronger or weaker penalty."""


class ItemPreferences(PreferenceFamily):
    """One free score per item, and a free low-rank term of users and items.

    The penalty `ridge / 2 * (|t|² + |v|²)` on the two factors is that of the trace norm of their product (Srebro et al.
    2004), so the ridge, rather than the rank, limits the user term.

    Args:
        seed: Seed of the initial weights.
    """

    shared_ridges = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    ranks = (8, 4, 2, 1)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Return a fitted Bradley-Terry score per item."""
        start = PreferenceModel(*(torch.zeros(size, dtype=torch.float64) for size in _sizes(votes, 0)))
        return self._fitted(votes, start, ridge, 0.0)

    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return fractions of the smallest ridge that removes the low-rank term.

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
        """Return fitted scores and low-rank term."""
        if start.tastes.shape[1] < rank:  # random start: the gradient at zero is zero
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
    """Shared weights of item features, and each user's deviations from them.

    For items that only one user has judged, so that only their features are informative.

    Args:
        features: `[I, K]` float64, scaled, since all share one penalty.
    """

    shared_ridges = (0.1, 1.0, 10.0, 100.0)

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.ranks = (features.shape[1],)

    def shared(self, votes: Votes, ridge: float) -> PreferenceModel:
        """Return a fitted weight per feature, by ridge logistic regression."""
        nothing = PreferenceModel(*(torch.zeros(size, dtype=torch.float64) for size in _sizes(votes, 0)))
        return self._fitted(votes, nothing, ridge, 0.0)

    def ridges(self, votes: Votes, shared: PreferenceModel) -> list[float]:
        """Return inverse variances of user weights around the shared ones, for standard deviations of 1 to 0.03."""
        return [1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]

    def personal(
        self, votes: Votes, start: PreferenceModel, shared_ridge: float, ridge: float, rank: int
    ) -> PreferenceModel:
        """Return fitted shared weights and users' deviations from them, which are shrunk toward zero."""
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

    Written out one dimension at a time with weighted counts, which is five times as fast as autograd.
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
    """Return `[I]` for each item the sum of values of its won votes minus that of its lost votes."""
    won, lost = (np.bincount(items, values, votes.num_items) for items in (votes.winners, votes.losers))
    return torch.from_numpy(won - lost)


def _minimise(weights: list[Tensor], objective: Callable[[], tuple[float, list[Tensor]]], votes: int) -> None:
    """Minimize a smooth function with gradients over `weights`, in place."""
    # Gains per vote below the tolerance do not matter for held-out votes.
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
