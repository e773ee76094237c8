"""Differences between users: the spread of their weights for features of an answer.

A logistic regression with random weights (a mixed model): user u prefers answer a to b with log-odds
`(w + δ_u) · (x_a - x_b)`, `δ_u ~ N(0, diag(τ²))`. The spread τ of each feature is fitted by maximum likelihood, with
the integral over δ_u replaced by a quadratic approximation around its mode (Breslow and Clayton 1993). So the noise of
few votes does not count as spread. N votes by U users, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prlhf_lightning.analysis.votes import Floats, Indices

_ROUNDS, _NEWTON, _EM = 6, 3, 60
_CHI_SQUARE_95 = 3.841458820694124  # quantile of the likelihood ratio of one number
_SMALLEST = 1e-3  # smaller spreads count as zero
_WIDEST = 20.0
_SIMULATIONS, _MANY_USERS = 3, 300
_NOTABLE, _LARGEST_CORRECTION = 0.1, 2.0  # no correction factor for spreads near zero


@dataclass(frozen=True)
class PreferenceSpread:
    """Users' weights for each feature, in log-odds per unit.

    Attributes:
        mean: `[F]` weight of the average user.
        spread: `[F]` standard deviation of users' weights.
        low: `[F]` lower end of the spread's 95% interval, by the likelihood ratio; 0 if users may all be alike.
        high: `[F]` upper end of the interval.
        weights: `[U, F]` most probable weights of each user; the mean for users without votes.
        stds: `[U, F]` posterior standard deviation of the weights.
    """

    mean: Floats
    spread: Floats
    low: Floats
    high: Floats
    weights: Floats
    stds: Floats


def preference_spread(users: Indices, differences: Floats, num_users: int, seed: int = 0) -> PreferenceSpread:
    """Return the fitted spread of users' weights for features.

    The quadratic approximation underestimates spreads if users gave few votes. The bias is measured on votes simulated
    from the fitted model, and spreads are multiplied by the resulting factor (parametric bootstrap).

    Args:
        users: `[N]` the user of each vote, below `num_users`; at least one vote.
        differences: `[N, F]` features of the chosen answer minus those of the rejected one, scaled so that typical
            differences are about one.
        num_users: U.
        seed: Seed of the simulated votes.
    """
    order = np.argsort(users, kind="stable")
    present, starts = np.unique(users[order], return_index=True)
    counts = np.diff(starts, append=len(users))
    votes = _Votes(differences[order], starts, np.repeat(np.arange(len(present)), counts))
    likelihood, variance = _fitted(votes)
    mean, deviations, covariances = likelihood.solved(variance)
    spread = np.sqrt(variance)
    ends = np.array([likelihood.interval(variance, feature) for feature in range(len(spread))])
    draw = np.random.default_rng(seed)
    simulated = [
        np.sqrt(_fitted(votes.drawn_again(mean + spread * draw.normal(size=deviations.shape), draw))[1])
        for _ in range(_SIMULATIONS if len(present) < _MANY_USERS else 1)
    ]
    lost = np.where(spread > _NOTABLE, spread / np.mean(simulated, axis=0), 1.0).clip(1.0, _LARGEST_CORRECTION)
    weights, stds = np.tile(mean, (num_users, 1)), np.tile(spread, (num_users, 1))
    weights[present] += deviations
    stds[present] = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    return PreferenceSpread(
        mean,
        spread * lost,
        np.minimum(ends[:, 0], spread) * lost,
        np.maximum(ends[:, 1], spread) * lost,
        weights,
        stds,
    )


def _fitted(votes: _Votes) -> tuple[_Quadratic, Floats]:
    """Return quadratic log-likelihoods around users' most likely weights, and the variances `[F]` of the weights."""
    features = votes.differences.shape[1]
    mean, variance, deviations = np.zeros(features), np.ones(features), np.zeros((len(votes.starts), features))
    likelihood = votes.expanded(mean + deviations)
    for _ in range(_ROUNDS):
        for _ in range(_NEWTON):
            likelihood = votes.expanded(mean + deviations)
            mean, deviations, _ = likelihood.solved(variance)
        for _ in range(_EM):
            mean, deviations, covariances = likelihood.solved(variance)
            scatter = (deviations**2 + np.diagonal(covariances, axis1=1, axis2=2)).mean(0)
            variance = scatter.clip(_SMALLEST**2, _WIDEST**2)
    return likelihood, variance


@dataclass(frozen=True)
class _Votes:
    """Votes sorted by user: differences `[N, F]`, the start of each user, and the user of each vote `[N]`."""

    differences: Floats
    starts: Indices
    users: Indices

    def drawn_again(self, weights: Floats, draw: np.random.Generator) -> _Votes:
        """Return simulated votes on the same pairs by users with weights `[U, F]`."""
        margins = np.einsum("nf,nf->n", self.differences, weights[self.users])
        same = draw.random(len(margins)) < 0.5 * (1 + np.tanh(margins / 2))
        return _Votes(np.where(same[:, None], self.differences, -self.differences), self.starts, self.users)

    def expanded(self, weights: Floats) -> _Quadratic:
        """Return each user's log-likelihood to second order around weights `[U, F]`."""
        margins = np.einsum("nf,nf->n", self.differences, weights[self.users])
        wrong = 0.5 * (1 - np.tanh(margins / 2))
        slope = np.add.reduceat(wrong[:, None] * self.differences, self.starts)
        curvature = (wrong * (1 - wrong))[:, None] * self.differences
        hessian = np.stack(
            [np.add.reduceat(curvature * column[:, None], self.starts) for column in self.differences.T], axis=1
        )
        return _Quadratic(slope + np.einsum("ufg,ug->uf", hessian, weights), hessian)


@dataclass(frozen=True)
class _Quadratic:
    """Users' log-likelihoods `b · θ - θ · H θ / 2`: `b` `[U, F]` and `H` `[U, F, F]`."""

    slope: Floats
    hessian: Floats

    def solved(self, variance: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the most likely mean `[F]`, and mode `[U, F]` and covariance `[U, F, F]` of users' deviations."""
        covariances = np.linalg.inv(self.hessian + np.diag(1 / variance)).astype(np.float64)
        weighed = self.hessian @ covariances  # the deviations are integrated out of the mean
        information = (self.hessian - weighed @ self.hessian).sum(0)
        target = (self.slope - np.einsum("ufg,ug->uf", weighed, self.slope)).sum(0)
        mean: Floats = np.linalg.solve(information + 1e-6 * np.eye(len(variance)), target)
        deviations: Floats = np.einsum("ufg,ug->uf", covariances, self.slope - self.hessian @ mean)
        return mean, deviations, covariances

    def log_likelihood(self, variance: Floats) -> float:
        """Return the log-likelihood with deviations integrated out, up to a constant."""
        mean, deviations, covariances = self.solved(variance)
        rest = self.slope - self.hessian @ mean
        log_det = -np.linalg.slogdet(covariances)[1] + np.log(variance).sum()
        fit = np.einsum("uf,uf->u", rest, deviations) / 2 - log_det / 2
        return float(fit.sum() + self.slope.sum(0) @ mean - mean @ self.hessian.sum(0) @ mean / 2)

    def interval(self, variance: Floats, feature: int) -> tuple[float, float]:
        """Return the likelihood-ratio interval of a feature's spread, with the other spreads fixed."""
        spreads = np.concatenate([[_SMALLEST], np.geomspace(0.02, _WIDEST, 30), [np.sqrt(variance[feature])]])
        spreads.sort()
        fits = np.empty(len(spreads))
        for place, spread in enumerate(spreads):
            changed = variance.copy()
            changed[feature] = spread**2
            fits[place] = self.log_likelihood(changed)
        excess = fits - (fits.max() - _CHI_SQUARE_95 / 2)
        inside = np.flatnonzero(excess >= 0)
        first, last = int(inside[0]), int(inside[-1])

        def crossing(outside: int, within: int) -> float:
            share = excess[within] / (excess[within] - excess[outside])
            return float(spreads[within] + share * (spreads[outside] - spreads[within]))

        low = 0.0 if first == 0 else crossing(first - 1, first)
        high = float(spreads[-1]) if last == len(spreads) - 1 else crossing(last + 1, last)
        return low, high
