"""What is known of a user before the first pair: how the rows of the trained users are spread about the generic one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class UserPrior:
    """`row = generic + scale * z @ directions`, `z ~ N(0, I)`: empirical Bayes in the trained users' main directions.

    The mean is the generic user and not the mean of the users, so that someone of whom nothing is known is the generic
    user exactly. The covariance is `scale^2` times the second moment of the trained users' rows about the generic one,
    cut off after the k directions in which they are spread most.

    Attributes:
        generic: `[p]` row of the generic user.
        directions: `[k, p]` principal directions, each as long as the trained users' root mean square along it.
        rest: Variance a number of what the directions leave out, `scale` not included; MAP rows are 0 there.
        scale: How much wider or narrower than the trained users' spread the prior is.
    """

    generic: Tensor
    directions: Tensor
    rest: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, rows: Tensor, generic: Tensor, rank: int = 16) -> UserPrior:
        """Fit the directions to trained users.

        Args:
            rows: `[U, p]` rows of the trained users.
            generic: `[p]` row of the generic user.
            rank: Most directions; fewer where the users span fewer.
        """
        spread = (rows - generic) / max(1, len(rows)) ** 0.5
        # A randomised SVD would do for millions of users; the Gram matrix is small on one side or the other.
        _, values, directions = torch.linalg.svd(spread.double(), full_matrices=False)
        noise = values.amax() * 1e-6 if len(values) else 0.0
        kept = min(rank, int((values > noise).sum()))
        scaled = (values[:kept, None] * directions[:kept]).to(rows.dtype)
        rest = float(values[kept:].square().sum()) / max(1, rows.shape[1])
        return cls(generic, scaled, rest)

    @property
    def rank(self) -> int:
        """Number k of directions."""
        return len(self.directions)

    def scaled(self, scale: float) -> UserPrior:
        """Return the same prior with another scale."""
        return replace(self, scale=scale)

    def rows(self, codes: Tensor) -> Tensor:
        """Return the rows `[B, p]` of whitened codes `[B, k]`; code 0 gives the generic row, bit by bit."""
        return self.generic + codes @ (self.scale * self.directions)

    def row_variances(self, covariance: Tensor) -> Tensor:
        """Return the variance of each number of a row, `[B, p]`, given the codes' covariance `[B, k, k]`."""
        directions = self.scale * self.directions
        inside = torch.einsum("kp,bkl,lp->bp", directions, covariance, directions)
        return (inside + self.scale**2 * self.rest).clamp(min=0)

    def whiten(self, gradients: Tensor) -> Tensor:
        """Return gradients by the codes `[n, k]` of gradients by the rows `[n, p]`."""
        return gradients @ (self.scale * self.directions).T

    def without(self, user: int, rows: Tensor, rank: int) -> UserPrior:
        """Return the prior that would have been fitted had a trained user not been there.

        Args:
            user: Position of the user in `rows`.
            rows: `[U, p]` rows of the trained users.
            rank: As in `fit`.
        """
        others = torch.cat([rows[:user], rows[user + 1 :]])
        return UserPrior.fit(others, self.generic, rank).scaled(self.scale)
