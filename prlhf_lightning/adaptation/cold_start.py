"""How much better off new users are after so many pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prlhf_lightning.adaptation.adapt import Adapted, Encoded, adapt_users, encode_users, fit_prior, trained_rows
from prlhf_lightning.adaptation.margins import Margins, select_pairs
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import PreferenceBatch

COUNTS = (0, 2, 5, 10, 20, 30)
_MOST_USERS = 2 / 3  # have as many pairs as the last point asks for


@dataclass(frozen=True)
class ColdStartPoint:
    """What so many pairs are worth, on other pairs of the same users.

    Attributes:
        pairs: Pairs that each user was adapted from.
        users: Number of users, who are the same at each point of a curve.
        accuracy: Mean over these users of their accuracy.
        generic: The same under the generic user.
        gain: Mean over users of the difference.
        interval: Half the width of its 95% interval, by the spread between users.
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
    steps: int = 0,
) -> list[ColdStartPoint]:
    """Learn new users from their first pairs, or read them off these, and see how well their others are ranked.

    All points are of the same users, so that the curve shows what pairs are worth and not who has many of them: it ends
    at the largest count that two thirds of the users have, and those with fewer pairs are left out.

    Args:
        model: A trained model.
        pairs: Pairs of users that it does not know, of each in the order in which they are to be used.
        held_out: Other pairs of the same users.
        counts: Numbers of pairs a user, of which those too large for most users are left out.
        prior: As in `adapt_users`; not used where the user model reads users off their pairs.
        steps: Likewise.
    """
    if model.user_model.history_size:
        learn: Callable[..., Encoded | Adapted] = partial(encode_users, model)
    else:
        learn = partial(adapt_users, model, prior=fit_prior(model, pairs) if prior is None else prior, steps=steps)
    places = defaultdict(list)
    for place, user_id in enumerate(pairs.user_ids):
        places[user_id].append(place)
    tested = set(held_out.user_ids)
    margins_of = Margins(model, held_out)
    generic_row = trained_rows(model)[1]
    without = _accuracies(held_out.user_ids, margins_of(generic_row))
    sizes = {user_id: len(own) for user_id, own in places.items() if user_id in tested}
    most = _last_count(list(sizes.values()), counts)
    users = tuple(user_id for user_id, size in sizes.items() if size >= most)
    points = []
    for count in [count for count in counts if count <= most and users]:
        first = torch.tensor([place for user_id in users for place in places[user_id][:count]], dtype=torch.long)
        rows = learn(select_pairs(pairs, first), user_ids=users).rows
        number = {user_id: place for place, user_id in enumerate(users)}
        of = torch.tensor([number.get(user_id, -1) for user_id in held_out.user_ids], device=rows.device)
        found = _accuracies(held_out.user_ids, margins_of(rows, of, only=of >= 0))
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
    """Return how many bits an answer tells of the user's kind on average: BALD (arXiv:1112.5745, Eq. 2).

    Args:
        weights: `[B, C]` probability of each kind.
        margins: `[N, C]` reward margin of each pair under it.

    Returns:
        `[B, N]` mutual information between answer and kind, at least 0 and at most 1.
    """
    chances = margins.sigmoid()
    return (_bits(weights @ chances.T) - weights @ _bits(chances).T).clamp(min=0)


def suggest(model: PersonalizedModel, adapted: Adapted, pool: PreferenceBatch, count: int) -> tuple[Tensor, Tensor]:
    """Choose pairs of a pool to ask each user, the most telling first.

    Args:
        model: The model that the users were adapted to.
        adapted: What is known of B users; with no pairs yet, what is known of anyone.
        pool: M pairs whose order means nothing. One or two passes of the policy a kind score them for all users.
        count: Pairs wanted a user; fewer where the pool is smaller.

    Returns:
        `[B, n]` places in the pool, and `[B, n]` the bits that each tells.
    """
    margins_of = Margins(model, pool)
    prior = adapted.prior
    under = torch.stack([margins_of(prior.rows(center)) for center in prior.centers], dim=1)
    found = information_gain(adapted.weights, under).topk(min(count, len(pool)), dim=1)
    return found.indices, found.values


def _bits(chance: Tensor) -> Tensor:
    """Entropy of a yes or no."""
    chance = chance.clamp(1e-7, 1 - 1e-7)
    return -(chance * chance.log2() + (1 - chance) * (1 - chance).log2())
