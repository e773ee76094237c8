"""A low-rank model of user ids and responses, which reads no text: how far a model of ids reaches.

It is for data in which several users judged the same responses. Every response that a user judged counts once, however
many of the user's pairs it is in: the pairs of a user repeat few opinions, so they are not independent votes.

N votes by U users on I items (responses); C distinct combinations of user and item; K dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prlhf_lightning.analysis.personalization_gain import Scheme, folds, mean_over_users
from prlhf_lightning.analysis.preference_models import PreferenceModel
from prlhf_lightning.analysis.votes import Floats, Indices, Votes

_FOLDS = 8  # by items, each leaves a user 7 of 8 opinions; with four folds, too few dimensions were chosen
_FIRST_RANK, _OTHER_RANKS = 4, (1, 2, 8)
_RIDGES = (3.0, 4.5, 6.5, 9.0, 13.0, 20.0)  # in opinions
_OFFSET_RIDGE, _SCORE_RIDGE = 1.0, 2.0
NUMBER_OF_FITS = _FOLDS * (1 + len(_RIDGES) + 3 * len(_OTHER_RANKS))
_SWEEPS, _ENOUGH = 60, 1e-4  # of the objective's relative change
_SCALES = tuple(np.geomspace(0.5, 12, 12))  # log-odds for a unit of opinion


@dataclass(frozen=True)
class Opinions:
    """What users think of single items, according to their votes.

    Attributes:
        users: `[C]` the user.
        items: `[C]` the item.
        values: `[C]` the share of the user's votes on the item that it won, minus the share that it lost.
        num_users: U.
        num_items: I.
    """

    users: Indices
    items: Indices
    values: Floats
    num_users: int
    num_items: int

    @classmethod
    def of(cls, votes: Votes) -> Opinions:
        """Collect the opinions of votes."""
        cells = votes.users * votes.num_items + np.stack([votes.winners, votes.losers])
        distinct, place = np.unique(cells, return_inverse=True)
        signs = np.repeat([1.0, -1.0], len(votes))
        values = np.bincount(place.ravel(), signs, len(distinct)) / np.bincount(place.ravel(), minlength=len(distinct))
        users, items = np.divmod(distinct, votes.num_items)
        return cls(users, items, values, votes.num_users, votes.num_items)


@dataclass(frozen=True)
class ResponseFactors:
    """A fitted model: the opinion of user u of item i is `a_u + b_i + <t_u, v_i>`, with normal noise.

    Attributes:
        offsets: `[U]` a; it cancels in the margins of pairs.
        model: The scores b, tastes t and items v. Its margins are in opinions, not in log-odds.
        ridge: The penalty of tastes and items.
        noise: Variance of the noise.
    """

    offsets: Floats
    model: PreferenceModel
    ridge: float
    noise: float

    def of_new_users(self, votes: Votes, known: Indices) -> PreferenceModel:
        """Return the model with the tastes of new users, and the average user's for those without votes.

        The prior of a user's taste and offset is normal, with the mean and the covariance of the fitted users. The
        taste is the mean of the posterior given the user's opinions, which is exact.

        Args:
            votes: Votes of the new users on the same items.
            known: The users whom the model was fitted to; the others' rows are not used.
        """
        items = _design(self.model.items.numpy())
        own = np.column_stack([self.model.tastes.numpy(), self.offsets])[known]
        center, k = own.mean(0), own.shape[1]
        precision: Floats = np.linalg.inv(np.cov(own, rowvar=False).reshape(k, k) + 1e-6 * np.eye(k)).astype(np.float64)
        opinions = Opinions.of(votes)
        rest = opinions.values - self.model.scores.numpy()[opinions.items] - items[opinions.items] @ center
        tastes = center + _ridge_regressions(
            opinions.users, items[opinions.items], rest, votes.num_users, self.noise * precision
        )
        return PreferenceModel(self.model.scores, torch.from_numpy(tastes[:, :-1].copy()), self.model.items)


def fit_factors(votes: Votes, rank: int, ridge: float, seed: int = 0) -> ResponseFactors:
    """Return the model that minimizes `Σ residual² + |a|² + 2|b|² + ridge (|t|² + |v|²)` over the opinions of votes.

    By alternating least squares (Zhou et al. 2008, without their weights by counts).

    Args:
        votes: N votes.
        rank: K; 0 for no tastes.
        ridge: Penalty of tastes and items.
        seed: Seed of the initial tastes and items.
    """
    opinions = Opinions.of(votes)
    draw = np.random.default_rng(seed)
    users, items, values = opinions.users, opinions.items, opinions.values
    offsets, scores = np.zeros(opinions.num_users), np.zeros(opinions.num_items)
    tastes, factors = (draw.normal(0, 0.1, (size, rank)) for size in (len(offsets), len(scores)))
    eye: Floats = ridge * np.eye(rank)
    before, own = np.inf, (tastes[users] * factors[items]).sum(1)
    for _ in range(_SWEEPS):
        offsets = _shrunken_means(users, values - scores[items] - own, len(offsets), _OFFSET_RIDGE)
        scores = _shrunken_means(items, values - offsets[users] - own, len(scores), _SCORE_RIDGE)
        rest = values - offsets[users] - scores[items]
        tastes = _ridge_regressions(users, factors[items], rest, len(offsets), eye)
        factors = _ridge_regressions(items, tastes[users], rest, len(scores), eye)
        own = (tastes[users] * factors[items]).sum(1)
        penalty = _OFFSET_RIDGE * np.sum(offsets**2) + _SCORE_RIDGE * np.sum(scores**2)
        penalty += ridge * (np.sum(tastes**2) + np.sum(factors**2))
        squares = float(np.sum((rest - own) ** 2))
        if before - (squares + penalty) < _ENOUGH * before:
            break
        before = squares + penalty
    model = PreferenceModel(*(torch.from_numpy(part) for part in (scores, tastes, factors)))
    return ResponseFactors(offsets, model, ridge, squares / len(values))


def well_fitted(
    votes: Votes, scheme: Scheme, seed: int = 0, on_fit: Callable[[], object] = lambda: None
) -> ResponseFactors:
    """Return the model of the rank and penalty that predict held-out votes best, in eight folds of the votes.

    What counts is the mean over users of the log-loss, at the best scale of the margins. The penalty is chosen at
    rank 4; other ranks are tried with it and its neighbors, and so is no taste at all (rank 0).

    Args:
        votes: N votes.
        scheme: Kind of held-out data, see `Scheme`.
        seed: Seed of folds and of initial tastes and items.
        on_fit: Called after each of about `NUMBER_OF_FITS`.
    """
    parts = [(votes[train], votes[test]) for train, test in folds(votes, scheme, seed, _FOLDS)]
    parts = [(train, test) for train, test in parts if len(train) and len(test)]
    losses: dict[tuple[int, float], float] = {}

    def best_of(choices: Iterable[tuple[int, float]]) -> tuple[int, float]:
        for rank, ridge in choices:
            margins = []
            for train, test in parts:
                margins.append(fit_factors(train, rank, ridge, seed).model.margins(test).numpy())
                on_fit()
            losses[rank, ridge] = _held_out_loss(margins, [test for _, test in parts])
        return min(losses, key=lambda choice: losses[choice])

    _, ridge = best_of([(0, _RIDGES[0]), *((_FIRST_RANK, ridge) for ridge in _RIDGES)])
    near = _RIDGES.index(ridge)
    rank, ridge = best_of((rank, one) for rank in _OTHER_RANKS for one in _RIDGES[max(0, near - 1) : near + 2])
    return fit_factors(votes, rank, ridge, seed)


def _held_out_loss(margins: Sequence[Floats], tests: Sequence[Votes]) -> float:
    if not margins:
        return 0.0  # nothing can be held out, so nothing but no taste is chosen
    margin, users = np.concatenate(margins), np.concatenate([test.users for test in tests])
    return min(mean_over_users(np.logaddexp(0, -scale * margin), users) for scale in _SCALES)


def _shrunken_means(groups: Indices, values: Floats, count: int, ridge: float) -> Floats:
    """Return `[count]` the sum of each group's values over their number plus a ridge."""
    means: Floats = np.bincount(groups, values, count) / (np.bincount(groups, minlength=count) + ridge)
    return means


def _ridge_regressions(groups: Indices, features: Floats, values: Floats, count: int, penalty: Floats) -> Floats:
    """Return `[count, K]` the weights of a ridge regression of each group's rows.

    Args:
        groups: `[C]` the group of each row.
        features: `[C, K]`.
        values: `[C]`.
        count: Number of groups.
        penalty: `[K, K]` positive definite.
    """
    k = features.shape[1]
    gram = np.empty((count, k, k))
    for i in range(k):  # one by one, so that no [C, K, K] is in memory
        for j in range(i + 1):
            gram[:, i, j] = gram[:, j, i] = np.bincount(groups, features[:, i] * features[:, j], count)
    right = np.empty((count, k))
    for i in range(k):
        right[:, i] = np.bincount(groups, features[:, i] * values, count)
    weights: Floats = np.linalg.solve(gram + penalty, right[..., None])[..., 0].astype(np.float64)
    return weights


def _design(items: Floats) -> Floats:
    """Return `[I, K + 1]` the items' factors, and 1 for the offset."""
    return np.column_stack([items, np.ones(len(items))])
