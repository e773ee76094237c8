"""Cold-start curves of new users, and selection of informative pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prlhf_lightning.adaptation.adapt import Adapted, Encoded, adapt_users, encode_users, fit_prior, trained_rows
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import PreferenceBatch, select_pairs

COUNTS = (0, 2, 5, 10, 20, 30)
_MOST_USERS = 2 / 3  # share of users with enough pairs for the last point


@dataclass(frozen=True)
class ColdStartPoint:
    """Accuracy after a number of pairs, on held-out pairs of the same users.

    Attributes:
        pairs: Number of pairs per user.
        users: Number of users, the same at each point of a curve.
        accuracy: Mean accuracy of the users.
        generic: The same under the generic user.
        gain: Mean over users of the difference.
        interval: Half the width of its 95% interval, from the spread between users.
    """

    pairs: int
    users: int
    accuracy: float
    generic: float
    gain: float
    interval: float


def cold_start(
    model: PersonalizedModel,
    pairs: PreferenceBatch,
    held_out: PreferenceBatch,
    counts: Sequence[int] = COUNTS,
    prior: UserPrior | None = None,
    steps: int | None = None,
) -> list[ColdStartPoint]:
    """Return the accuracy on held-out pairs of new users after increasing numbers of pairs.

    All points use the same users, so that the curve shows the effect of pairs and not of users with many pairs. It ends
    at the largest count that two thirds of the users have; users with fewer pairs are left out.

    Args:
        model: A trained model.
        pairs: Pairs of unknown users, for each user in order of use.
        held_out: Other pairs of the same users.
        counts: Numbers of pairs per user; counts too large for most users are left out.
        prior: As in `adapt_users`; ignored if the user model reads pairs.
        steps: Likewise.
    """
    if model.user_model.history_size:
        learn: Callable[..., Encoded | Adapted] = partial(encode_users, model)
    else:
        learn = partial(adapt_users, model, prior=fit_prior(model, pairs) if prior is None else prior, steps=steps)
    margins_of = Margins(model, held_out)

    def margins_after(first: Tensor, users: tuple[str, ...]) -> Tensor:
        rows = learn(select_pairs(pairs, first), user_ids=users).rows
        number = {user_id: place for place, user_id in enumerate(users)}
        of = torch.tensor([number.get(user_id, -1) for user_id in held_out.user_ids], device=rows.device)
        return margins_of(rows, of, only=of >= 0)

    generic_margins = margins_of(trained_rows(model)[1])
    return cold_start_points(pairs.user_ids, held_out.user_ids, generic_margins, margins_after, counts)


def cold_start_points(
    user_ids: Sequence[str],
    tested_ids: Sequence[str],
    generic_margins: Tensor,
    margins_after: Callable[[Tensor, tuple[str, ...]], Tensor],
    counts: Sequence[int] = COUNTS,
) -> list[ColdStartPoint]:
    """Return the points of `cold_start`, however users are learned.

    Args:
        user_ids: The user of each pair to learn from, for each user in order of use.
        tested_ids: The user of each of M held-out pairs.
        generic_margins: `[M]` margins of the held-out pairs under the generic user.
        margins_after: Returns their margins `[M]` after users were learned from the pairs at places `[n]`; margins of
            other users' pairs are ignored.
        counts: Numbers of pairs per user; counts too large for most users are left out.
    """
    places = defaultdict(list)
    for place, user_id in enumerate(user_ids):
        places[user_id].append(place)
    tested = set(tested_ids)
    without = _accuracies(tested_ids, generic_margins)
    sizes = {user_id: len(own) for user_id, own in places.items() if user_id in tested}
    most = _last_count(list(sizes.values()), counts)
    users = tuple(user_id for user_id, size in sizes.items() if size >= most)
    points = []
    for count in [count for count in counts if count <= most and users]:
        first = torch.tensor([place for user_id in users for place in places[user_id][:count]], dtype=torch.long)
        found = _accuracies(tested_ids, margins_after(first, users))
        gains = torch.tensor([found[user_id] - without[user_id] for user_id in users])
        accuracy, generic = (sum(values[user_id] for user_id in users) / len(users) for values in (found, without))
        spread = float(gains.std()) if len(users) > 1 else float("nan")
        points.append(
            ColdStartPoint(count, len(users), accuracy, generic, float(gains.mean()), 1.96 * spread / len(users) ** 0.5)
        )
    return points


def _last_count(sizes: Sequence[int], counts: Sequence[int]) -> int:
    """Return the largest count that most users reach; the smallest count if there is none."""
    reached = [count for count in counts if sum(size >= count for size in sizes) >= _MOST_USERS * len(sizes)]
    return max(reached, default=min(counts))


def _accuracies(user_ids: Sequence[str], margins: Tensor) -> dict[str, float]:
    hits = defaultdict(list)
    for user_id, margin in zip(user_ids, margins.tolist(), strict=True):
        hits[user_id].append(0.5 if margin == 0 else float(margin > 0))
    return {user_id: sum(own) / len(own) for user_id, own in hits.items()}


def information_gain(weights: Tensor, margins: Tensor) -> Tensor:
    """Return the expected information of an answer about the user's kind in bits: BALD (arXiv:1112.5745, Eq. 2).

    Args:
        weights: `[B, C]` probability of each kind.
        margins: `[N, C]` reward margin of each pair under each kind.

    Returns:
        `[B, N]` mutual information between answer and kind, at least 0 and at most 1.
    """
    chances = margins.sigmoid()
    return (_bits(weights @ chances.T) - weights @ _bits(chances).T).clamp(min=0)


def suggest(model: PersonalizedModel, adapted: Adapted, pool: PreferenceBatch, count: int) -> tuple[Tensor, Tensor]:
    """Return the most informative pairs of a pool for each user, best first.

    Args:
        model: The model that the users were adapted to.
        adapted: The state of B users, also of users without pairs.
        pool: M pairs in any order. One or two passes of the policy per kind score them for all users.
        count: Number of pairs per user; fewer if the pool is smaller.

    Returns:
        `[B, n]` positions in the pool, and `[B, n]` their information in bits.
    """
    margins_of = Margins(model, pool)
    prior = adapted.prior
    under = torch.stack([margins_of(prior.rows(center)) for center in prior.centers], dim=1)
    found = information_gain(adapted.weights, under).topk(min(count, len(pool)), dim=1)
    return found.indices, found.values


def _bits(chance: Tensor) -> Tensor:
    """Return the entropy of a Bernoulli variable in bits."""
    chance = chance.clamp(1e-7, 1 - 1e-7)
    return -(chance * chance.log2() + (1 - chance) * (1 - chance).log2())
