"""A new user's row from a handful of pairs, everything else frozen.

MAP under an empirical-Bayes prior, found by Gauss-Newton: the margins are linearised in the user's code, the logistic
regression that is left is solved exactly in k dimensions, and so again from there. A pass of the policy over the pairs
is all that costs anything, and there are as many as `steps`, for all users at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.adaptation.laplace import Posterior, laplace, negative_log_posterior
from prlhf_lightning.adaptation.margins import Margins, select_pairs, table_rows
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import PreferenceBatch


@dataclass(frozen=True)
class Adapted:
    """What was learned of B users.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: the numbers of all row tables side by side.
        prior: What was taken for known before the pairs.
        posterior: What is known after them, of the whitened codes.
        counts: `[B]` pairs of each user.
        margins: `[N]` reward margin of each pair under its user's new row.
        margin_std: `[N]` posterior standard deviation of these margins.
        generic_margins: `[N]` the same under the generic user.
    """

    user_ids: tuple[str, ...]
    rows: Tensor
    prior: UserPrior
    posterior: Posterior
    counts: Tensor
    margins: Tensor
    margin_std: Tensor
    generic_margins: Tensor

    @property
    def std(self) -> Tensor:
        """`[B, p]` posterior standard deviation of each number of a row."""
        return self.prior.row_variances(self.posterior.covariance).sqrt()

    @property
    def uncertainty(self) -> Tensor:
        """`[B]` root mean variance over the prior's dimensions, which is 1 before the first pair."""
        return self.posterior.covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt()


def trained_rows(model: PersonalizedLM) -> tuple[Tensor, Tensor]:
    """Return the trained users' rows `[U, p]` and the row of a new one `[p]`, of all tables side by side."""
    tables = model.user_model.row_tables()
    new = [row.detach()[None] for row in model.user_model.new_rows([table.detach() for table in tables])]
    return table_rows(tables)[1:], table_rows(new)[0]


def adapt_users(
    model: PersonalizedLM,
    pairs: PreferenceBatch,
    user_ids: Sequence[str] | None = None,
    prior: UserPrior | None = None,
    steps: int = 3,
    batch_size: int = 128,
) -> Adapted:
    """Learn users from their pairs; the model is left as it is.

    Args:
        model: A trained model.
        pairs: N pairs of new users, in any order.
        user_ids: The users; those of the pairs by default. One without a pair gets the generic row, bit by bit.
        prior: What is known before the pairs; fitted to the model's users by default.
        steps: Linearisations, each a forward and backward pass over the pairs.
        batch_size: Pairs in a pass of the policy.

    Returns:
        The users' rows, and how certain they are. No user's row has a lower posterior than the generic user's.
    """
    user_ids = tuple(dict.fromkeys(pairs.user_ids)) if user_ids is None else tuple(user_ids)
    prior = UserPrior.fit(*trained_rows(model)) if prior is None else prior
    layout = _Layout(user_ids, pairs.user_ids)
    margins_of = Margins(model, pairs, batch_size)
    was_training = model.training
    model.eval()
    try:
        return _gauss_newton(user_ids, prior, layout, margins_of, steps)
    finally:
        model.train(was_training)


class _Layout:
    """Where each pair stands in blocks `[B, n]` that have a row a user."""

    def __init__(self, user_ids: Sequence[str], of_pairs: Sequence[str]) -> None:
        number = {user_id: place for place, user_id in enumerate(user_ids)}
        self.user = torch.tensor([number[user_id] for user_id in of_pairs], dtype=torch.long)
        self.counts = torch.bincount(self.user, minlength=len(user_ids))
        order = self.user.argsort(stable=True)
        start = self.counts.cumsum(0) - self.counts
        self.slot = torch.empty_like(self.user)
        self.slot[order] = torch.arange(len(order)) - start[self.user[order]]
        width = int(self.counts.max()) if len(self.counts) else 0
        self.mask = torch.arange(width) < self.counts[:, None]

    def block(self, values: Tensor) -> Tensor:
        """Return values of the pairs `[N, ...]` as `[B, n, ...]`, zero where there is none."""
        block = values.new_zeros(*self.mask.shape, *values.shape[1:])
        block[self.user, self.slot] = values
        return block


def _gauss_newton(
    user_ids: tuple[str, ...], prior: UserPrior, layout: _Layout, margins_of: Margins, steps: int
) -> Adapted:
    mask, codes = layout.mask, torch.zeros(len(user_ids), prior.rank)
    best, value = codes, torch.full((len(user_ids),), torch.inf)
    margins = generic = torch.zeros(margins_of.count)
    slopes = torch.zeros(margins_of.count, prior.rank)
    posterior = laplace(layout.block(margins), layout.block(slopes), mask)
    for step in range(steps + 1):
        last = step == steps
        found, gradients = margins_of(prior.rows(codes)[layout.user], gradients=not last)
        new = negative_log_posterior(layout.block(found), codes, mask)
        better = new < value
        value, best = torch.where(better, new, value), torch.where(better[:, None], codes, best)
        taken = better[layout.user]
        margins = torch.where(taken, found, margins)
        if step == 0:
            generic = found
        if gradients is None:
            break
        slopes = torch.where(taken[:, None], prior.whiten(gradients), slopes)
        # Margins as a function of the code, linearised where the posterior is highest so far.
        offsets = margins - (slopes * best[layout.user]).sum(1)
        posterior = laplace(layout.block(offsets), layout.block(slopes), mask)
        # Where the last step went too far, half of it is tried.
        codes = torch.where(better[:, None], posterior.mode, (codes + best) / 2)
    variance = posterior.margin_variance(layout.block(slopes))[layout.user, layout.slot]
    return Adapted(
        user_ids,
        prior.rows(best),
        prior,
        Posterior(best, posterior.covariance),
        layout.counts,
        margins,
        variance.sqrt(),
        generic,
    )
