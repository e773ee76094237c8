"""The prior of new users, fitted to the rows of trained users.

U trained users, rows of p numbers, k main directions, K kinds of users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LEAST_INSIDE = 0.05  # variance of a kind's users, where kinds explain the whole prior


@dataclass(frozen=True)
class UserPrior:
    """`row = generic + z @ directions`, `z` from a mixture of Gaussians: empirical Bayes on the trained users' rows.

    Users come in kinds, and the effect of a row saturates. A Gaussian around the generic user has its highest density
    where no user is, and little curvature to learn from. So a few trained users represent all: each is the center of a
    kind. By definition a user without pairs is the generic user; for others the generic user is one more kind, as
    likely as a single trained user.

    Attributes:
        generic: `[p]` row of the generic user.
        directions: `[k, p]` orthogonal directions, principal ones and further ones that the centers need. Each is as
            long as the users' standard deviation along it: 1 if the prior is known, and otherwise the root mean square
            of the trained rows.
        centers: `[1 + K, k]` codes of the kinds; the first, 0, is the generic user.
        weights: `[1 + K]` probabilities of the kinds.
        std: Spread of the users of a kind around its center, in each direction.
        judgments: `[1 + K, M]` probability with which each kind prefers the first of two completions, of M pairs.
        is_known: Whether the spread is that of the prior that trained rows were estimated with. If not, it is the
            spread of these rows, whose noise is unknown.
    """

    generic: Tensor
    directions: Tensor
    centers: Tensor
    weights: Tensor
    std: float
    judgments: Tensor
    is_known: bool = False

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        generic: Tensor,
        judgments: Tensor,
        kinds: int | None = None,
        rank: int = 8,
        generic_judgements: Tensor | None = None,
        is_unit: bool = False,
    ) -> UserPrior:
        """Return the prior fitted to trained users.

        Args:
            rows: `[U, p]` rows of the trained users.
            generic: `[p]` row of the generic user.
            judgments: `[U, M]` predicted probabilities that each user prefers the first of two completions. Kinds are
                clustered by these and not by the rows, since different rows may encode the same preferences.
            kinds: Maximum number of kinds; by default the number that predicts held-out users best, see `choose_kinds`.
            rank: Maximum number of principal directions; fewer if the users span fewer.
            generic_judgements: `[M]` the same for the generic user; 0.5 by default.
            is_unit: Whether rows were estimated with the prior N(generic, I). Estimated rows differ less than the users
                do, so the spread inside kinds is then what the kinds leave of that prior.
        """
        like, users = rows, len(rows)
        # On the host: many small steps in float64, which not every device supports.
        rows, generic, judgments = rows.cpu(), generic.cpu(), judgments.cpu()
        judgments = judgments.double()
        undecided = judgments.new_full(judgments.shape[1:], 0.5)
        by_generic = undecided if generic_judgements is None else generic_judgements.cpu().double()
        distances = torch.cdist(judgments, judgments)
        medoids = medoids_of(distances, min(users, choose_kinds(judgments, by_generic) if kinds is None else kinds))
        away = (rows - generic).double()
        directions = _directions(away, medoids, rank)
        if is_unit:
            directions = nn.functional.normalize(directions, dim=1)
        codes = away @ (directions / directions.square().sum(1, keepdim=True)).T
        kept = len(directions)
        kind = distances[:, medoids].argmin(1) if users else distances.new_zeros(0, dtype=torch.long)
        sizes = torch.bincount(kind, minlength=len(medoids)).double()
        # The center is itself one of the n users of its kind, which slightly overestimates the spread.
        inside = (codes - codes[medoids][kind]).square().sum() / max(1, (users - len(medoids)) * kept)
        if is_unit and users:
            between = (sizes[:, None] * codes[medoids].square()).sum(0) / users
            inside = (1 - between).clamp(min=_LEAST_INSIDE).mean()
        return cls(
            generic.to(like),
            directions.to(like),
            torch.cat([codes.new_zeros(1, kept), codes[medoids]]).to(like),
            torch.cat([codes.new_ones(1), sizes]).to(like) / (1 + users),
            float(inside) ** 0.5,
            torch.cat([by_generic[None], judgments[medoids]]).to(like),
            is_unit,
        )

    @property
    def rank(self) -> int:
        """Number k of directions."""
        return len(self.directions)

    @property
    def stds(self) -> Tensor:
        """`[1 + K]` spread of each kind; 0 for the generic user."""
        spread = torch.full_like(self.weights, self.std)
        spread[0] = 0.0
        return spread

    def rows(self, codes: Tensor) -> Tensor:
        """Return the rows `[..., p]` of codes `[..., k]`; code 0 gives exactly the generic row."""
        return self.generic + codes @ self.directions


def _directions(away: Tensor, medoids: Tensor, rank: int) -> Tensor:
    """Return `[k, p]` orthogonal directions: up to `rank` principal ones, and those that the medoids need.

    Rows have many more dimensions than there are principal directions, which cover only a part of a row. Without the
    other directions, a kind would not match any user's preferences.

    Args:
        away: `[U, p]` users' rows minus the generic one.
        medoids: `[K]` users that represent the kinds.
        rank: Maximum number of principal directions.
    """
    if not len(away):
        return away
    _, values, principal = torch.linalg.svd(away, full_matrices=False)
    principal = principal[: min(rank, int((values > 1e-6 * values.amax()).sum()))]
    rest = away[medoids] - away[medoids] @ principal.T @ principal
    _, sizes, beside = torch.linalg.svd(rest, full_matrices=False)
    found = torch.cat([principal, beside[sizes > 1e-6 * values.amax()]])
    return found * (away @ found.T).square().mean(0).sqrt()[:, None]


MOST_KINDS = 16
_FOLDS, _DRAWS = 8, 4
_LEARNED = (0.1, 0.3, 0.6)  # shares of the pairs that a new user has given
_CLOSE, _NEGLIGIBLE = 0.03, 0.005
_CLAMP = 1e-3


def choose_kinds(judgments: Tensor, generic: Tensor, most: int = MOST_KINDS, seed: int = 0) -> int:
    """Return the number of kinds that predicts held-out users best.

    In each fold, some users are left out and kinds are chosen among the rest. Judgments of the users left out are
    sampled, a few of these give the user's kind, and the score is the log-likelihood of the others. Too few kinds miss
    preferences, too many need more pairs to find the right one. The result is the smallest number whose score is close
    to the best one: within a standard error over users, within 3% of the gain of kinds, or within 0.005 nats per pair.
    Each kind costs a pass over new users' pairs.

    Args:
        judgments: `[U, M]` float64 probabilities of trained users.
        generic: `[M]` probabilities of the generic user.
        most: Maximum number of kinds.
        seed: Seed of folds, pairs and judgments.
    """
    users, pairs = judgments.shape
    most = min(most, users - -(-users // _FOLDS))
    if most < 2 or pairs < 2:
        return max(1, min(users, most))
    draw = torch.Generator().manual_seed(seed)
    judgments, generic = judgments.clamp(_CLAMP, 1 - _CLAMP), generic.clamp(_CLAMP, 1 - _CLAMP)
    fold = torch.randperm(users, generator=draw) % min(_FOLDS, users)
    orders = torch.stack([torch.randperm(pairs, generator=draw) for _ in range(_DRAWS)])
    answers = torch.rand(_DRAWS, users, pairs, generator=draw, dtype=judgments.dtype) < judgments
    scores = judgments.new_zeros(most, users)
    for part in range(int(fold.max()) + 1):
        rest, out = (fold != part).nonzero().flatten(), (fold == part).nonzero().flatten()
        distances = torch.cdist(judgments[rest], judgments[rest])
        for kinds in range(1, most + 1):
            medoids = medoids_of(distances, kinds)
            sizes = torch.bincount(distances[:, medoids].argmin(1), minlength=kinds).to(judgments)
            weights = torch.cat([sizes.new_ones(1), sizes]) / (1 + len(rest))
            under = torch.cat([generic[None], judgments[rest][medoids]])
            scores[kinds - 1, out] = _predicted(answers[:, out], orders, under, weights)
    behind = scores[int(scores.mean(1).argmax())] - scores
    close = (behind.std(1) / users**0.5).clamp(min=max(_NEGLIGIBLE, _CLOSE * float(behind.mean(1)[0])))
    return 1 + int((behind.mean(1) <= close).nonzero()[0])


def _predicted(answers: Tensor, orders: Tensor, under: Tensor, weights: Tensor) -> Tensor:
    """Return `[B]` the mean log-likelihood of users' answers, given a few other answers.

    Args:
        answers: `[D, B, M]` bool, preferred completion of each of B users, sampled D times.
        orders: `[D, M]` orders of the pairs.
        under: `[C, M]` probabilities of each kind.
        weights: `[C]` probability of each kind.
    """
    logs = torch.stack([(1 - under).log(), under.log()])  # [2, C, M]
    total = under.new_zeros(answers.shape[1])
    for own, order in zip(answers, orders, strict=True):
        found = logs[own.long()[:, order], :, order]  # [B, M, C]
        for share in _LEARNED:
            learned = min(found.shape[1] - 1, max(1, round(share * found.shape[1])))
            posterior = (weights.log() + found[:, :learned].sum(1)).log_softmax(1)
            total += (posterior[:, None] + found[:, learned:]).logsumexp(2).mean(1)
    return total / (len(orders) * len(_LEARNED))


def medoids_of(distances: Tensor, count: int) -> Tensor:
    """Return the k-medoids of users, built greedily and improved by swaps (Kaufman and Rousseeuw 1990).

    Args:
        distances: `[U, U]` distances between users.
        count: K, at most U.
    """
    if not count:
        return torch.zeros(0, dtype=torch.long)
    taken = [int(distances.sum(1).argmin())]
    while len(taken) < count:
        nearest = distances[:, taken].amin(1)
        gains = (nearest[:, None] - distances).clamp(min=0).sum(0)
        gains[taken] = -1
        taken.append(int(gains.argmax()))
    for _ in range(20):
        kind = distances[:, taken].argmin(1)
        members = [(kind == place).nonzero().flatten() for place in range(count)]
        better = [
            int(m[distances[m][:, m].sum(1).argmin()]) if len(m) else t for t, m in zip(taken, members, strict=True)
        ]
        if better == taken:
            break
        taken = better
    return torch.tensor(taken)
