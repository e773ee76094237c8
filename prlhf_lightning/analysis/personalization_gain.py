"""Estimate of the gain from personalization: held-out accuracy with and without users' own preferences.

Both models are small (see `preference_models`) and regularized by cross-validation within the training votes: an
overfitted user is worse than none, and would hide a real gain. The difference estimates what a language model can gain
from knowing the user. It may gain less or, since it reads the texts, more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from torch.nn.functional import softplus

from prlhf_lightning.analysis.preference_models import PreferenceFamily, PreferenceModel
from prlhf_lightning.analysis.votes import Floats, Indices, Mask, Votes

Verdict: TypeAlias = Literal["something", "next to nothing", "cannot tell"]
Scheme: TypeAlias = Literal["items", "pairs", "votes"]
"""Kind of held-out data: `pairs` of items for all users, `votes` (pairs for single users), or `items` of each user.

With `items`, votes between two held-out items are held out. Votes on one of them are in neither part, so that the
user's opinion of it is unknown.
"""

#: A smaller gain in pair accuracy counts as negligible.
SMALL = 0.01
#: With fewer held-out votes or users, the absence of a small gain is not evidence.
ENOUGH_VOTES, ENOUGH_USERS = 1000, 30
_FOLDS = 4
_EXTENSIONS = 4  # of the grid of penalties, if its weakest is best


@dataclass(frozen=True)
class Comparison:
    """Pair accuracy of two models; a tie counts half.

    Attributes:
        shared: Of the model that all users share.
        personal: Of the model with users' own preferences.
        gain: The difference.
        low: Lower end of its 95% interval, by a bootstrap over users given the two models.
        high: Upper end of the interval.
    """

    shared: float
    personal: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """Regularization of the models.

    Attributes:
        shared_ridge: Penalty of the shared part.
        ridge: Penalty of users' own preferences.
        rank: Dimensions of users' own preferences.
    """

    shared_ridge: float
    ridge: float
    rank: int


@dataclass(frozen=True)
class PersonalizationGain:
    """Gain from users' own preferences, on held-out votes of training users.

    Attributes:
        by_user: Mean accuracy over users: what a user may expect.
        by_vote: Accuracy over votes, dominated by the busiest users.
        shared_loss: Mean over users of the shared model's log-loss.
        personal_loss: The same for the model with users' own preferences.
        votes: Number of held-out votes.
        users: Number of users who gave them.
        half_by: Smallest number of users who account for half of all gained votes.
        chosen: Choice of cross-validation within the training votes of each part.
    """

    by_user: Comparison
    by_vote: Comparison
    shared_loss: float
    personal_loss: float
    votes: int
    users: int
    half_by: int
    chosen: tuple[Choice, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on whether personalization helps the average user."""
        if self.by_user.low > 0:
            return "something"
        enough = self.votes >= ENOUGH_VOTES and self.users >= ENOUGH_USERS
        return "next to nothing" if enough and self.by_user.high < SMALL else "cannot tell"


def scheme_for(votes: Votes, validation: Votes | None) -> Scheme:
    """Return the scheme that resembles the split of `validation`, or without it the strictest possible one.

    Otherwise votes of other users on the same pairs would reveal held-out votes.
    """
    cells = _cells(votes)
    recur = 2 * len(votes) > 1.5 * len(np.unique(cells))
    if recur and (validation is None or np.isin(_cells(validation), cells).mean() < 0.5):
        return "items"
    if validation is not None:
        return "pairs" if np.isin(validation.pairs, votes.pairs).mean() < 0.5 else "votes"
    pairs, items = (len(np.unique(part)) for part in (votes.pairs, np.stack([votes.winners, votes.losers])))
    return "pairs" if 2 * pairs > 1.5 * items else "votes"


def known_from_others(votes: Votes, validation: Votes) -> float:
    """Return the share of `validation` votes on two items that other users voted on.

    Args:
        votes: Votes to learn from.
        validation: The votes to check, which may be the same votes.
    """
    cells = np.unique(_cells(votes))
    users_of = np.bincount(cells % votes.num_items, minlength=votes.num_items)
    known = users_of[np.stack([validation.winners, validation.losers])] - np.isin(_cells(validation), cells) > 0
    return float(known.all(0).mean())


def folds(votes: Votes, scheme: Scheme, seed: int, count: int = _FOLDS) -> Iterator[tuple[Mask, Mask]]:
    """Yield masks of training and held-out votes, both `[N]`.

    Args:
        votes: N votes.
        scheme: Kind of held-out data, see `Scheme`.
        seed: Seed of the parts.
        count: Number of parts.
    """
    pair = np.unique(votes.pairs, return_inverse=True)[1]
    keys = {"items": _cells(votes), "pairs": pair[None], "votes": (votes.users * len(votes) + pair)[None]}[scheme]
    distinct, place = np.unique(keys, return_inverse=True)
    part = np.random.default_rng(seed).integers(count, size=len(distinct))[place.reshape(keys.shape)]
    for fold in range(count):
        yield (part != fold).all(0), (part == fold).all(0)


def personalization_gain(
    parts: Sequence[tuple[Votes, Votes]],
    family: PreferenceFamily,
    scheme: Scheme,
    seed: int = 0,
    on_fit: Callable[[], object] = lambda: None,
) -> PersonalizationGain | None:
    """Return the comparison of both models, fitted to votes and evaluated on others.

    Args:
        parts: Training votes and evaluation votes, usually one part. With several parts, each has its own models, and
            the evaluation votes are pooled. Votes of users without training votes are left out.
        family: Kind of models.
        scheme: Scheme of the folds for cross-validation.
        seed: Seed of folds and bootstrap samples.
        on_fit: Called after each of about `number_of_fits` a part.

    Returns:
        The comparison, or None if there are too few votes to hold any out.
    """
    users, chosen = [], []
    values: list[list[Floats]] = [[], [], [], []]
    for votes, validation in parts:
        validation = validation[np.isin(validation.users, votes.users)]
        inner = [
            (votes[train], votes[test]) for train, test in folds(votes, scheme, seed) if train.any() and test.any()
        ]
        if not inner or not len(validation):
            continue
        shared, personal, choice = _well_regularised(votes, inner, family, on_fit)
        models = (shared, personal)
        users.append(validation.users)
        chosen.append(choice)
        found = [of(model, validation) for of in (_right, _losses) for model in models]
        for known, value in zip(values, found, strict=True):
            known.append(value)
    if not users:
        return None
    who = np.concatenate(users)
    (before, counts), (after, _), *losses = (_sums(np.concatenate(value), who) for value in values)
    gains = np.sort(after - before)[::-1].clip(min=0)
    return PersonalizationGain(
        by_user=_compared(before / counts, after / counts, np.ones_like(counts), seed),
        by_vote=_compared(before, after, counts, seed),
        shared_loss=float((losses[0][0] / counts).mean()),
        personal_loss=float((losses[1][0] / counts).mean()),
        votes=len(who),
        users=len(counts),
        half_by=int(np.searchsorted(gains.cumsum(), gains.sum() / 2)) + 1 if gains.any() else 0,
        chosen=tuple(chosen),
    )


def _well_regularised(
    votes: Votes, parts: list[tuple[Votes, Votes]], family: PreferenceFamily, on_fit: Callable[[], object]
) -> tuple[PreferenceModel, PreferenceModel, Choice]:
    """Return both models with the regularization that is best in cross-validation, and that choice."""
    starts, shared_ridge = _choose_shared(parts, family, on_fit)
    shared = family.shared(votes, shared_ridge)
    rank, ridge = _choose_personal(parts, starts, family, family.ridges(votes, shared), shared_ridge, on_fit)
    personal = family.personal(votes, shared, shared_ridge, ridge, rank)
    on_fit()
    return shared, personal, Choice(shared_ridge, ridge, rank)


def shared_preferences(votes: Votes, family: PreferenceFamily, scheme: Scheme, seed: int = 0) -> PreferenceModel:
    """Return the model that all users share, with the penalty that is best in cross-validation within the votes."""
    parts = [(votes[train], votes[test]) for train, test in folds(votes, scheme, seed) if train.any() and test.any()]
    _, ridge = _choose_shared(parts, family, lambda: None)
    return family.shared(votes, ridge)


def number_of_fits(family: PreferenceFamily, num_ridges: int = 6) -> int:
    """Return the approximate number of fitted models for one part."""
    return _FOLDS * (len(family.shared_ridges) + num_ridges + len(family.ranks) - 1) + 1


def _choose_shared(
    parts: list[tuple[Votes, Votes]], family: PreferenceFamily, on_fit: Callable[[], object]
) -> tuple[list[PreferenceModel], float]:
    """Return the shared model of each fold, and the penalty that is best over all folds."""
    models, losses = [], np.zeros(len(family.shared_ridges))
    for train, test in parts:
        models.append([family.shared(train, ridge) for ridge in family.shared_ridges])
        losses += [_held_out_loss(model, test) for model in models[-1]]
        for _ in family.shared_ridges:
            on_fit()
    best = int(losses.argmin())
    return [of_fold[best] for of_fold in models], family.shared_ridges[best]


def _choose_personal(
    parts: list[tuple[Votes, Votes]],
    starts: list[PreferenceModel],
    family: PreferenceFamily,
    ridges: list[float],
    shared_ridge: float,
    on_fit: Callable[[], object],
) -> tuple[int, float]:
    """Return the best rank and penalty of users' own preferences, choosing the penalty at the largest rank first."""
    ridges = list(ridges)
    paths: list[list[PreferenceModel]] = []
    losses = np.zeros(len(ridges))
    for (train, test), start in zip(parts, starts, strict=True):
        path = []
        for ridge in ridges:  # weakest first: a vanished preference cannot be recovered
            start = family.personal(train, start, shared_ridge, ridge, family.ranks[0])
            path.append(start)
            on_fit()
        losses += [_held_out_loss(model, test) for model in path]
        paths.append(path)
    for _ in range(_EXTENSIONS):
        if losses.argmin() > 0:
            break
        ridges.insert(0, ridges[0] / 2)
        total = 0.0
        for path, (train, test) in zip(paths, parts, strict=True):
            path.insert(0, family.personal(train, path[0], shared_ridge, ridges[0], family.ranks[0]))
            total += _held_out_loss(path[0], test)
        losses = np.insert(losses, 0, total)
    best = int(losses.argmin())
    by_rank = [losses[best]]
    tops = [path[best] for path in paths]
    for rank in family.ranks[1:]:
        total = 0.0
        for (train, test), top in zip(parts, tops, strict=True):
            total += _held_out_loss(family.personal(train, top, shared_ridge, ridges[best], rank), test)
            on_fit()
        by_rank.append(total)
    return family.ranks[int(np.argmin(by_rank))], ridges[best]


def mean_over_users(values: Floats, users: Indices) -> float:
    """Return the mean over users of each user's mean value.

    Args:
        values: `[N]`.
        users: `[N]` the user of each.
    """
    sums, counts = _sums(values, users)
    return float((sums / counts).mean())


def bootstrap(sums: Floats, counts: Floats, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile interval of `sums.sum() / counts.sum()` under resampling of users.

    Args:
        sums: `[U]` the sum of each user's values.
        counts: `[U]` the number of each user's values.
        seed: Random seed.
        samples: Number of bootstrap samples.
    """
    draw = np.random.default_rng(seed)
    means = np.empty(samples)
    for sample in range(samples):
        drawn = draw.integers(len(counts), size=len(counts))
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _compared(before: Floats, after: Floats, weights: Floats, seed: int) -> Comparison:
    """Compare two models by users' sums of correct votes and their weights, all `[U]`."""
    shared, personal = (float(right.sum() / weights.sum()) for right in (before, after))
    low, high = bootstrap(after - before, weights, seed)
    return Comparison(shared, personal, personal - shared, low, high)


def _right(model: PreferenceModel, votes: Votes) -> Floats:
    """Return `[N]` 1 for each vote whose winner is ahead, 0.5 for a tie, 0 otherwise."""
    right: Floats = ((model.margins(votes).sign() + 1) / 2).numpy()
    return right


def _held_out_loss(model: PreferenceModel, votes: Votes) -> float:
    """Return the mean over users of their log-loss, so that busy users do not dominate the choice."""
    return mean_over_users(_losses(model, votes), votes.users)


def _losses(model: PreferenceModel, votes: Votes) -> Floats:
    """Return `[N]` the log-loss of each vote."""
    losses: Floats = softplus(-model.margins(votes)).numpy()
    return losses


def _sums(values: Floats, users: Indices) -> tuple[Floats, Floats]:
    """Return the sum and the number of values, `[U]`, of each user with any."""
    place = np.unique(users, return_inverse=True)[1]
    return np.bincount(place, weights=values).astype(float), np.bincount(place).astype(float)


def _cells(votes: Votes) -> Indices:
    """`[2, N]` the key of user and item, for winners and losers."""
    return votes.users * votes.num_items + np.stack([votes.winners, votes.losers])
