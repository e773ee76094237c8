"""How much there is to personalise: held-out pair accuracy with what users have in common, and with their own tastes.

Both models are small (see `taste_models`), and as well regularised as cross-validation within the training votes can
make them: an overfitted user is worse than none, and would hide what there is. What a language model can gain from
knowing the user is then about the difference; it may gain less, or, as it reads the texts, more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from torch.nn.functional import softplus

from prlhf_lightning.metrics.taste_models import TasteFamily, TasteModel
from prlhf_lightning.metrics.votes import Floats, Indices, Mask, Votes

Verdict: TypeAlias = Literal["something", "next to nothing", "cannot tell"]

#: A gain in pair accuracy below this is next to nothing.
SMALL = 0.01
#: With fewer held-out votes, or users who gave them, the absence of a small gain shows nothing.
ENOUGH_VOTES, ENOUGH_USERS = 1000, 30
_FOLDS = 4


@dataclass(frozen=True)
class Headroom:
    """What users' own tastes add.

    Attributes:
        shared: Held-out pair accuracy of what users share; a tie is half right.
        personal: The same with what each user adds.
        gain: The difference.
        low: Lower end of its 95% interval, a bootstrap over users given the two models.
        high: Upper end of the same.
        shared_loss: Mean held-out log-loss of the former.
        personal_loss: Mean held-out log-loss of the latter.
        votes: Held-out votes of users whom training meets.
        users: Users who gave them.
        rank: Dimensions of taste, as chosen.
        ridge: Penalty of a taste, as chosen.
        shared_ridge: Penalty of what users share, as chosen.
    """

    shared: float
    personal: float
    gain: float
    low: float
    high: float
    shared_loss: float
    personal_loss: float
    votes: int
    users: int
    rank: int
    ridge: float
    shared_ridge: float

    @property
    def verdict(self) -> Verdict:
        """Whether there is something to personalise."""
        if self.low > 0:
            return "something"
        enough = self.votes >= ENOUGH_VOTES and self.users >= ENOUGH_USERS
        return "next to nothing" if enough and self.high < SMALL else "cannot tell"


def recurring(votes: Votes) -> bool:
    """Return whether users vote on the same item more than once and a half, as where ratings were made into pairs."""
    return 2 * len(votes) > 1.5 * len(np.unique(_cells(votes)))


def new_to_their_users(votes: Votes, validation: Votes) -> bool:
    """Return whether most held-out votes are on items on which their user has not voted in training."""
    return bool(np.isin(_cells(validation), _cells(votes)).mean() < 0.5)


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


def folds(votes: Votes, by_item: bool, seed: int, count: int = _FOLDS) -> Iterator[tuple[Mask, Mask]]:
    """Yield votes to train on and votes to hold out, both `[N]`.

    Args:
        votes: N votes.
        by_item: Whether a quarter of each user's items is set aside, only votes between two of them are held out, and
            those on one of them are in neither part: then, as with `new_to_their_users`, the user's opinion of a
            held-out item is not known. Otherwise a quarter of the pairs of each user.
        seed: Draws the parts.
        count: Number of parts.
    """
    draw = np.random.default_rng(seed)
    keys = _cells(votes) if by_item else (votes.users * votes.num_items**2 + votes.pairs)[None]
    distinct, place = np.unique(keys, return_inverse=True)
    part = draw.integers(count, size=len(distinct))[place.reshape(keys.shape)]
    for fold in range(count):
        yield (part != fold).all(0), (part == fold).all(0)


def headroom(
    votes: Votes,
    validation: Votes,
    family: TasteFamily,
    by_item: bool,
    seed: int = 0,
    on_fit: Callable[[], object] = lambda: None,
) -> Headroom:
    """Fit both models to votes and compare them on others.

    Args:
        votes: Votes to train on.
        validation: Votes to compare on. Those of users whom training does not meet are left out.
        family: Kind of models.
        by_item: How folds of the votes are made for cross-validation; see `folds`.
        seed: Draws folds and bootstrap samples.
        on_fit: Called after each of the `number_of_fits`.

    Raises:
        ValueError: There are too few votes to hold any out.
    """
    validation = validation[np.isin(validation.users, votes.users)]
    parts = [(votes[train], votes[test]) for train, test in folds(votes, by_item, seed) if train.any() and test.any()]
    if not parts or not len(validation):
        raise ValueError("there are too few votes")
    starts, shared_ridge = _choose_shared(parts, family, on_fit)
    shared = family.shared(votes, shared_ridge)
    rank, ridge = _choose_personal(parts, starts, family, family.ridges(votes, shared), shared_ridge, on_fit)
    personal = family.personal(votes, shared, shared_ridge, ridge, rank)
    on_fit()
    margins = [model.margins(validation) for model in (shared, personal)]
    hits = [((margin.sign() + 1) / 2).numpy() for margin in margins]
    losses = [float(softplus(-margin).mean()) for margin in margins]
    low, high = bootstrap_over_users(hits[1] - hits[0], validation.users, seed)
    accuracies = [float(hit.mean()) for hit in hits]
    return Headroom(
        *accuracies,
        accuracies[1] - accuracies[0],
        low,
        high,
        *losses,
        len(validation),
        len(np.unique(validation.users)),
        rank,
        ridge,
        shared_ridge,
    )


def number_of_fits(family: TasteFamily, num_ridges: int = 6) -> int:
    """Return about how many models are fitted on the way."""
    return _FOLDS * (len(family.shared_ridges) + num_ridges + len(family.ranks) - 1) + 1


def _choose_shared(
    parts: list[tuple[Votes, Votes]], family: TasteFamily, on_fit: Callable[[], object]
) -> tuple[list[TasteModel], float]:
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
    starts: list[TasteModel],
    family: TasteFamily,
    ridges: list[float],
    shared_ridge: float,
    on_fit: Callable[[], object],
) -> tuple[int, float]:
    """Return the rank and penalty of tastes that are best over all folds: the penalty at the largest rank first."""
    losses = np.zeros(len(ridges))
    paths = []
    for (train, test), start in zip(parts, starts, strict=True):
        path = []
        for ridge in ridges:  # from the weakest on, as there is no way back from a taste that has vanished
            start = family.personal(train, start, shared_ridge, ridge, family.ranks[0])
            path.append(start)
            on_fit()
        losses += [_held_out_loss(model, test) for model in path]
        paths.append(path)
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


def bootstrap_over_users(values: Floats, users: Indices, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean of values when users, with all their values, are drawn again.

    Args:
        values: `[N]`.
        users: `[N]` the user of each.
        seed: Draws the users.
        samples: How often.
    """
    _, place = np.unique(users, return_inverse=True)
    counts = np.bincount(place).astype(float)
    sums = np.bincount(place, weights=values)
    draw = np.random.default_rng(seed)
    means = np.empty(samples)
    for sample in range(samples):
        drawn = draw.integers(len(counts), size=len(counts))
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _held_out_loss(model: TasteModel, votes: Votes) -> float:
    return float(softplus(-model.margins(votes)).sum())


def _cells(votes: Votes) -> Indices:
    """`[2, N]` the key of user and item, for winners and losers."""
    return votes.users * votes.num_items + np.stack([votes.winners, votes.losers])
