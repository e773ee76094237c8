"""Small models of votes, with one score an item that all users share, and without or with what a user adds to it.

They see who voted on which items, not a text, and fit in seconds: a yardstick of what there is to personalise. N votes
by U users on I items; K dimensions of taste.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus

from prlhf_lightning.metrics.votes import Votes

_ITERATIONS = 100


@dataclass(frozen=True)
class TasteModel:
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

    def truncated(self, rank: int) -> TasteModel:
        """Return the model with the best approximation of lower rank of what users add, both factors of one size."""
        left, left_factor = torch.linalg.qr(self.tastes)
        right, right_factor = torch.linalg.qr(self.items)
        u, sizes, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
        root = sizes[:rank].sqrt()
        return TasteModel(self.scores, left @ u[:, :rank] * root, right @ v[:rank].T * root)


class TasteFamily(ABC):
    """Models of one kind, which cross-validation chooses among.

    Attributes:
        shared_ridges: Penalties of what users share, to choose from.
        ranks: Dimensions of taste, to choose from, the largest first.
    """

    shared_ridges: Sequence[float]
    ranks: Sequence[int]

    @abstractmethod
    def shared(self, votes: Votes, ridge: float) -> TasteModel:
        """Fit what all users share."""

    @abstractmethod
    def ridges(self, votes: Votes, shared: TasteModel) -> list[float]:
        """Return penalties of what a user adds, the weakest first; under the last next to nothing of it is left."""

    @abstractmethod
    def personal(self, votes: Votes, start: TasteModel, shared_ridge: float, ridge: float, rank: int) -> TasteModel:
        """Fit both what users share and what each adds, from a model with less or with more of a taste."""


class ItemTastes(TasteFamily):
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

    def shared(self, votes: Votes, ridge: float) -> TasteModel:
        """Fit a Bradley-Terry score an item."""
        scores = torch.zeros(votes.num_items, dtype=torch.float64, requires_grad=True)
        nothing = [scores.new_zeros(rows, 0) for rows in (votes.num_users, votes.num_items)]

        def objective() -> Tensor:
            return _loss(TasteModel(scores, *nothing), votes) + ridge / 2 * scores.square().sum()

        _minimise([scores], objective)
        return TasteModel(scores.detach(), *nothing)

    def ridges(self, votes: Votes, shared: TasteModel) -> list[float]:
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

    def personal(self, votes: Votes, start: TasteModel, shared_ridge: float, ridge: float, rank: int) -> TasteModel:
        """Fit scores and the low-rank term."""
        if start.tastes.shape[1] < rank:  # nothing to start from: at zero there is no slope
            draw = torch.Generator().manual_seed(self.seed)
            sizes = [(rows, rank) for rows in (votes.num_users, votes.num_items)]
            start = TasteModel(
                start.scores, *(0.1 * torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
            )
        elif start.tastes.shape[1] > rank:
            start = start.truncated(rank)
        weights = [part.clone().requires_grad_() for part in (start.scores, start.tastes, start.items)]
        model = TasteModel(*weights)

        def objective() -> Tensor:
            size = model.tastes.square().sum() + model.items.square().sum()
            return _loss(model, votes) + shared_ridge / 2 * model.scores.square().sum() + ridge / 2 * size

        _minimise(weights, objective)
        return TasteModel(*(part.detach() for part in weights))


class FeatureTastes(TasteFamily):
    """Weights of an item's features that all users share, and what each user adds to each weight.

    For items that only one user has seen: what can be known of them is what their features say.

    Args:
        features: `[I, K]` float64; scale them, since one penalty is for all.
    """

    shared_ridges = (0.1, 1.0, 10.0, 100.0)

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.ranks = (features.shape[1],)

    def shared(self, votes: Votes, ridge: float) -> TasteModel:
        """Fit a weight a feature, by ridge logistic regression."""
        weights = self.features.new_zeros(self.features.shape[1]).requires_grad_()
        nothing = [self.features.new_zeros(rows, 0) for rows in (votes.num_users, votes.num_items)]

        def objective() -> Tensor:
            model = TasteModel(self.features @ weights, *nothing)
            return _loss(model, votes) + ridge / 2 * weights.square().sum()

        _minimise([weights], objective)
        return TasteModel(self.features @ weights.detach(), *nothing)

    def ridges(self, votes: Votes, shared: TasteModel) -> list[float]:
        """Return inverse variances of a user's weights around the shared ones: a standard deviation of 1 to 0.03."""
        return [1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]

    def personal(self, votes: Votes, start: TasteModel, shared_ridge: float, ridge: float, rank: int) -> TasteModel:
        """Fit shared weights and each user's deviations from them, which are shrunk towards none."""
        weights = torch.linalg.lstsq(self.features, start.scores[:, None], driver="gelsd").solution[:, 0]
        weights = weights.clone().requires_grad_()
        has_tastes = start.tastes.shape[1] > 0
        tastes = start.tastes.clone() if has_tastes else weights.new_zeros(votes.num_users, self.features.shape[1])
        tastes = tastes.detach().requires_grad_()

        def objective() -> Tensor:
            model = TasteModel(self.features @ weights, tastes, self.features)
            penalty = shared_ridge / 2 * weights.square().sum() + ridge / 2 * tastes.square().sum()
            return _loss(model, votes) + penalty

        _minimise([weights, tastes], objective)
        return TasteModel(self.features @ weights.detach(), tastes.detach(), self.features)


def _loss(model: TasteModel, votes: Votes) -> Tensor:
    loss: Tensor = softplus(-model.margins(votes)).sum()
    return loss


def _minimise(weights: list[Tensor], objective: Callable[[], Tensor]) -> None:
    """Minimise a smooth function of some weights, in place."""
    optimizer = torch.optim.LBFGS(
        weights, max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-4, tolerance_change=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
