"""How much there is to personalize: held-out accuracy with what users have in common, and with their own tastes.

Both models are small (see `taste_models`), and as well regularized as cross-validation within the training votes can
make them: an overfitted user is worse than none, and would hide what there is. What a language model can gain from
knowing the user is then about the difference; it may gain less, or, as it reads the texts, more.
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
"""What is held out: `pairs` of items, for all users; `votes`, that is pairs for single users; or `items` of each user.

Of `items` the votes between two of them are held out; those on one of them are in neither part, so that the user's
opinion of it is not known.
"""

#: A gain in pair accuracy below this is next to nothing.
SMALL = 0.01
#: With fewer held-out votes, or users who gave them, the absence of a small gain shows nothing.
ENOUGH_VOTES, ENOUGH_USERS = 1000, 30
_FOLDS = 4
_EXTENSIONS = 4  # of the grid of penalties, where its weakest is best


@dataclass(frozen=True)
class Comparison:
    """Pair accuracy of two models; a tie is half right.

    Attributes:
        shared: Of what users have in common.
        personal: With what each user adds.
        gain: The difference.
        low: Lower end of its 95% interval, a bootstrap over users given the two models.
        high: Upper end of the same.
    """

    shared: float
    personal: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """How models are regularized.

    Attributes:
        shared_ridge: Penalty of what users share.
        ridge: Penalty of a taste.
        rank: Dimensions of taste.
    """

    shared_ridge: float
    ridge: float
    rank: int


@dataclass(frozen=True)
class PersonalizationGain:
    """What users' own tastes add, on held-out votes of users whom training meets.

    Attributes:
        by_user: Means over users of each one's accuracy: what a user may expect.
        by_vote: Accuracy over votes, which is that of the busiest users above all.
        shared_loss: Mean over users of the log-loss of what users have in common.
        personal_loss: The same with what each user adds.
        votes: Number of held-out votes.
        users: Number of users who gave them.
        half_by: How many users, those who gain most, make half of what all users who gain gain, in votes.
        chosen: What cross-validation chose within the training votes of each part.
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
        """Whether there is something to personalize for a user, whoever it is."""
        if self.by_user.low > 0:
            return "something"
        enough = self.votes >= ENOUGH_VOTES and self.users >= ENOUGH_USERS
        return "next to nothing" if enough and self.by_user.high < SMALL else "cannot tell"


def scheme_for(votes: Votes, validation: Votes | None) -> Scheme:
    """Return how to hold out votes so that it resembles how `validation` was, or, without one, as strictly as can be.

    Users who judged the same pairs would otherwise tell one another's votes: not as taste, but as what all make of it.
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
    """Return the share of some votes of which both items were voted on by other users.

    Args:
        votes: Votes to learn from.
        validation: The votes in question, which may be the same.
    """
    cells = np.unique(_cells(votes))
    users_of = np.bincount(cells % votes.num_items, minlength=votes.num_items)
    known = users_of[np.stack([validation.winners, validation.losers])] - np.isin(_cells(validation), cells) > 0
    return float(known.all(0).mean())


def folds(votes: Votes, scheme: Scheme, seed: int, count: int = _FOLDS) -> Iterator[tuple[Mask, Mask]]:
    """Yield votes to train on and votes to hold out, both `[N]`.

    Args:
        votes: N votes.
        scheme: What is held out, see `Scheme`.
        seed: Draws the parts.
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
    """Fit both models to votes and compare them on others.

    Args:
        parts: Votes to train on and votes to compare on; usually one part. Of several, each with models of its own, the
            votes to compare on are taken together. Those of users whom training does not meet are left out.
        family: Kind of models.
        scheme: How folds of the votes are made for cross-validation.
        seed: Draws folds and bootstrap samples.
        on_fit: Called after each of about `number_of_fits` a part.

    Returns:
        The comparison, or None where there are too few votes to hold any out.
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
    """Return both models of some votes, and how they are regularized: as is best over the parts of these votes."""
    starts, shared_ridge = _choose_shared(parts, family, on_fit)
    shared = family.shared(votes, shared_ridge)
    rank, ridge = _choose_personal(parts, starts, family, family.ridges(votes, shared), shared_ridge, on_fit)
    personal = family.personal(votes, shared, shared_ridge, ridge, rank)
    on_fit()
    return shared, personal, Choice(shared_ridge, ridge, rank)


def number_of_fits(family: PreferenceFamily, num_ridges: int = 6) -> int:
    """Return about how many models are fitted on the way, for one part."""
    return _FOLDS * (len(family.shared_ridges) + num_ridges + len(family.ranks) - 1) + 1


def _choose_shared(
    parts: list[tuple[Votes, Votes]], family: PreferenceFamily, on_fit: Callable[[], object]
) -> tuple[list[PreferenceModel], float]:
    """Return each fold's model of what users share, and the penalty that is best over all folds."""
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
    """Return the rank and penalty of tastes that are best over all folds: the penalty at the largest rank first."""
    ridges = list(ridges)
    paths: list[list[PreferenceModel]] = []
    losses = np.zeros(len(ridges))
    for (train, test), start in zip(parts, starts, strict=True):
        path = []
        for ridge in ridges:  # from the weakest on, as there is no way back from a taste that has vanished
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
    """Return the mean over users of the mean of each one's values.

    Args:
        values: `[N]`.
        users: `[N]` the user of each.
    """
    sums, counts = _sums(values, users)
    return float((sums / counts).mean())


def bootstrap(sums: Floats, counts: Floats, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile interval of `sums.sum() / counts.sum()` when users are drawn again, with replacement.

    Args:
        sums: `[U]` the sum of each user's values.
        counts: `[U]` the number of them.
        seed: Draws the users.
        samples: How often.
    """
    draw = np.random.default_rng(seed)
    means = np.empty(samples)
    for sample in range(samples):
        drawn = draw.integers(len(counts), size=len(counts))
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _compared(before: Floats, after: Floats, weights: Floats, seed: int) -> Comparison:
    """Compare two models by sums of users' right votes, and what these are sums of, all `[U]`."""
    shared, personal = (float(right.sum() / weights.sum()) for right in (before, after))
    low, high = bootstrap(after - before, weights, seed)
    return Comparison(shared, personal, personal - shared, low, high)


def _right(model: PreferenceModel, votes: Votes) -> Floats:
    """Return `[N]` 1 for each vote whose winner is ahead, 0.5 for a tie, 0 otherwise."""
    right: Floats = ((model.margins(votes).sign() + 1) / 2).numpy()
    return right


def _held_out_loss(model: PreferenceModel, votes: Votes) -> float:
    """Return the mean over users of their log-loss: what is good for most users is chosen, not for the busiest."""
    return mean_over_users(_losses(model, votes), votes.users)


def _losses(model: PreferenceModel, votes: Votes) -> Floats:
    """Return `[N]` the log-loss of each vote."""
    losses: Floats = softplus(-model.margins(votes)).numpy()
    return losses


def _sums(values: Floats, users: Indices) -> tuple[Floats, Floats]:
    """Return the sum and the number of each user's values, `[U]`, of those who have any."""
    place = np.unique(users, return_inverse=True)[1]
    return np.bincount(place, weights=values).astype(float), np.bincount(place).astype(float)


def _cells(votes: Votes) -> Indices:
    """`[2, N]` the key of user and item, for winners and losers."""
    return votes.users * votes.num_items + np.stack([votes.winners, votes.losers])
