"""What is known of a user before the first pair: how the trained users' rows lie about the generic user's.

U trained users, rows of p numbers, k main directions, K kinds of users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UserPrior:
    """`row = generic + z @ directions`, `z` from a mixture of Gaussians: empirical Bayes on the trained users' rows.

    Users come in kinds, and what a row does saturates. A Gaussian about the generic user has its highest density where
    nobody is and little curvature to learn from, so a few trained users stand for all: each is the centre of a kind. A
    user without pairs is the generic user all the same, by definition; for others the generic user is one more kind,
    as likely as any one of the trained users.

    Attributes:
        generic: `[p]` row of the generic user.
        directions: `[k, p]` principal directions, each as long as the trained users' root mean square along it.
        centres: `[1 + K, k]` codes of the kinds; first that of the generic user, 0.
        weights: `[1 + K]` how likely each is, summing to 1.
        std: Spread of the users of a kind about its centre, in each direction.
    """

    generic: Tensor
    directions: Tensor
    centres: Tensor
    weights: Tensor
    std: float

    @classmethod
    def fit(cls, rows: Tensor, generic: Tensor, judgements: Tensor, kinds: int = 4, rank: int = 8) -> UserPrior:
        """Fit the prior to trained users.

        Args:
            rows: `[U, p]` rows of the trained users.
            generic: `[p]` row of the generic user.
            judgements: `[U, M]` probabilities with which the model has each of them prefer the first of two
                completions. Kinds are told apart by these and not by the rows, in which the same taste may be written
                in many ways.
            kinds: Most kinds.
            rank: Most directions; fewer where the users span fewer.
        """
        like, users = rows, len(rows)
        # On the host: many small steps, in float64, which not every device has.
        rows, generic, judgements = rows.cpu(), generic.cpu(), judgements.cpu()
        spread = ((rows - generic) / max(1, users) ** 0.5).double()
        _, values, directions = torch.linalg.svd(spread, full_matrices=False)
        kept = min(rank, int((values > 1e-6 * values.amax()).sum())) if users else 0
        directions = values[:kept, None] * directions[:kept]
        codes = (rows - generic).double() @ (directions / values[:kept, None].square()).T
        distances = torch.cdist(judgements.double(), judgements.double())
        medoids = _medoids(distances, min(kinds, users))
        kind = distances[:, medoids].argmin(1) if users else distances.new_zeros(0, dtype=torch.long)
        sizes = torch.bincount(kind, minlength=len(medoids)).double()
        # Around a centre that is itself one of the n users of its kind, which spreads them a little too far apart.
        inside = (codes - codes[medoids][kind]).square().sum() / max(1, (users - len(medoids)) * kept)
        return cls(
            generic.to(like),
            directions.to(like),
            torch.cat([codes.new_zeros(1, kept), codes[medoids]]).to(like),
            torch.cat([codes.new_ones(1), sizes]).to(like) / (1 + users),
            float(inside) ** 0.5,
        )

    @property
    def rank(self) -> int:
        """Number k of directions."""
        return len(self.directions)

    @property
    def stds(self) -> Tensor:
        """`[1 + K]` spread of each kind; that of the generic user has none."""
        spread = torch.full_like(self.weights, self.std)
        spread[0] = 0.0
        return spread

    def rows(self, codes: Tensor) -> Tensor:
        """Return the rows `[..., p]` of codes `[..., k]`; code 0 gives the generic row, bit by bit."""
        return self.generic + codes @ self.directions


def _medoids(distances: Tensor, count: int) -> Tensor:
    """Choose users who stand for all: k-medoids, built greedily and improved by swaps (Kaufman and Rousseeuw 1990).

    Args:
        distances: `[U, U]` between users.
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
