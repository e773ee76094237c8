"""What is known of a user before the first pair: how the trained users' rows lie about the generic user's.

U trained users, rows of p numbers, k main directions, K kinds of users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.adaptation.kinds import choose_kinds, medoids_of


@dataclass(frozen=True)
class UserPrior:
    """`row = generic + z @ directions`, `z` from a mixture of Gaussians: empirical Bayes on the trained users' rows.

    Users come in kinds, and what a row does saturates. A Gaussian about the generic user has its highest density where
    nobody is and little curvature to learn from, so a few trained users stand for all: each is the centre of a kind. A
    user without pairs is the generic user all the same, by definition; for others the generic user is one more kind,
    as likely as any one of the trained users.

    Attributes:
        generic: `[p]` row of the generic user.
        directions: `[k, p]` orthogonal directions, each as long as the trained users' root mean square along it: the
            principal ones, and those that the centers need beside.
        centres: `[1 + K, k]` codes of the kinds; first that of the generic user, 0.
        weights: `[1 + K]` how likely each is, summing to 1.
        std: Spread of the users of a kind about its centre, in each direction.
        judgements: `[1 + K, M]` probability with which each kind prefers the first of two completions, of M pairs.
    """

    generic: Tensor
    directions: Tensor
    centres: Tensor
    weights: Tensor
    std: float
    judgements: Tensor

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        generic: Tensor,
        judgements: Tensor,
        kinds: int | None = None,
        rank: int = 8,
        generic_judgements: Tensor | None = None,
    ) -> UserPrior:
        """Fit the prior to trained users.

        Args:
            rows: `[U, p]` rows of the trained users.
            generic: `[p]` row of the generic user.
            judgements: `[U, M]` probabilities with which the model has each of them prefer the first of two
                completions. Kinds are told apart by these and not by the rows, in which the same taste may be written
                in many ways.
            kinds: Most kinds; by default as many as predict users best who are left out, see `choose_kinds`.
            rank: Most principal directions; fewer where the users span fewer.
            generic_judgements: `[M]` the same of the generic user; undecided by default.
        """
        like, users = rows, len(rows)
        # On the host: many small steps, in float64, which not every device has.
        rows, generic, judgements = rows.cpu(), generic.cpu(), judgements.cpu()
        judgements = judgements.double()
        undecided = judgements.new_full(judgements.shape[1:], 0.5)
        by_generic = undecided if generic_judgements is None else generic_judgements.cpu().double()
        distances = torch.cdist(judgements, judgements)
        medoids = medoids_of(distances, min(users, choose_kinds(judgements, by_generic) if kinds is None else kinds))
        away = (rows - generic).double()
        directions = _directions(away, medoids, rank)
        codes = away @ (directions / directions.square().sum(1, keepdim=True)).T
        kept = len(directions)
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
            torch.cat([by_generic[None], judgements[medoids]]).to(like),
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


def _directions(away: Tensor, medoids: Tensor, rank: int) -> Tensor:
    """Return `[k, p]` orthogonal directions: up to `rank` principal ones, and those in which the medoids stick out.

    Rows have many more numbers than there are principal directions, which show but a part of anybody's row: without the
    others a kind would be nobody's taste.

    Args:
        away: `[U, p]` users' rows less the generic one.
        medoids: `[K]` which users stand for a kind.
        rank: Most principal directions.
    """
    if not len(away):
        return away
    _, values, principal = torch.linalg.svd(away, full_matrices=False)
    principal = principal[: min(rank, int((values > 1e-6 * values.amax()).sum()))]
    rest = away[medoids] - away[medoids] @ principal.T @ principal
    _, sizes, beside = torch.linalg.svd(rest, full_matrices=False)
    found = torch.cat([principal, beside[sizes > 1e-6 * values.amax()]])
    return found * (away @ found.T).square().mean(0).sqrt()[:, None]
