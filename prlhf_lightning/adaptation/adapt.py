"""Rows of new users from a handful of pairs each, with everything else frozen.

There are two parts for every user. The first infers the user's kind: the pairs are scored under each kind. The second
infers the difference from the kind: margins are linearized there, and the resulting Bayesian logistic regression is
solved exactly in few dimensions. The cost is the passes of the policy over the pairs, which all users share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.adaptation.laplace import laplace
from prlhf_lightning.adaptation.margins import Margins, row_tables, table_rows, users_in
from prlhf_lightning.adaptation.pauses import pause
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel, pool_history
from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens, select_pairs

# A kind with a lower probability than this after a user's first pairs is not scored on the rest.
_FIRST, _RULED_OUT = 4, 1e-3
_STEPS = 2
# Enough to distinguish kinds of users, in a few seconds.
_USERS, _PAIRS = 64, 32


@dataclass(frozen=True)
class Adapted:
    """Result of adaptation: B users, with N pairs in all.

    The posterior of a user's code is a mixture of Gaussians; its mean gives the row.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: all row tables concatenated.
        prior: The prior.
        counts: `[B]` pairs of each user.
        weights: `[B, 1 + K]` posterior probability of each kind; the first is the generic user.
        modes: `[B, 1 + K, k]` most probable code of each kind.
        covariances: `[B, 1 + K, k, k]` covariance of each kind around its mode.
        users: `[N]` index of each pair's user.
        under: `[N, 1 + K]` reward margin of each pair under each kind, 0 if the kind was ruled out before.
    """

    user_ids: tuple[str, ...]
    rows: Tensor
    prior: UserPrior
    counts: Tensor
    weights: Tensor
    modes: Tensor
    covariances: Tensor
    users: Tensor
    under: Tensor

    @property
    def mean(self) -> Tensor:
        """`[B, k]` posterior mean of the codes."""
        return torch.einsum("bc,bck->bk", self.weights, self.modes)

    @property
    def covariance(self) -> Tensor:
        """`[B, k, k]` posterior covariance of the codes, within kinds and between them."""
        away = self.modes - self.mean[:, None]
        return torch.einsum("bc,bckl->bkl", self.weights, self.covariances + away[..., None] * away[:, :, None])

    @property
    def generic_margins(self) -> Tensor:
        """`[N]` margin of each pair under the generic user."""
        return self.under[:, 0]

    @property
    def uncertainty(self) -> Tensor:
        """`[B]` root mean square of the dimensions' standard deviations; the trained users' spread is about 1."""
        return self.covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=0).sqrt()

    @property
    def expected_accuracy(self) -> Tensor:
        """`[B]` expected pair accuracy of each user's row, computed by the model itself.

        Computed on the pairs of `prior.judgments`, the same for all users. It is correct if the model's margins are
        calibrated.
        """
        return (self.weights * self._accuracies).sum(1)

    @property
    def expected_accuracy_std(self) -> Tensor:
        """`[B]` standard deviation of that accuracy, from the uncertainty about the user's kind."""
        away = self._accuracies - self.expected_accuracy[:, None]
        return (self.weights * away.square()).sum(1).sqrt()

    @property
    def _accuracies(self) -> Tensor:
        """`[B, 1 + K]` pair accuracy of each user's predicted judgments, given each kind."""
        chances = self.prior.judgments
        first = self.weights @ chances > 0.5  # [B, M]
        return torch.where(first[:, None], chances, 1 - chances).mean(2)

    @property
    def settled(self) -> Tensor:
        """`[B]` share of the prior variance of each user's judgments that their pairs have removed, from 0 to 1.

        The variance is over the kinds. The share may fall below 0 if the first pairs contradict the common kinds.
        """
        before = _open(self.prior.weights, self.prior.judgments)
        return 1 - _open(self.weights, self.prior.judgments) / before.clamp(min=1e-12)

    def left_out(self) -> Tensor:
        """Return the leave-one-out probability `[N]` of each pair given its user's others, from the kinds alone."""
        evidence = F.logsigmoid(self.under)
        others = (self.weights.log()[self.users] - evidence).softmax(1)
        return (others * self.under.sigmoid()).sum(1)

    @property
    def std(self) -> Tensor:
        """`[B, p]` posterior standard deviation of each number of a row."""
        directions = self.prior.directions
        return torch.einsum("kp,bkl,lp->bp", directions, self.covariance, directions).clamp(min=0).sqrt()


def _open(weights: Tensor, judgments: Tensor) -> Tensor:
    """Return the variance of `[1 + K, M]` judgments over kinds of weights `[..., 1 + K]`, `[...]` means over pairs."""
    return (weights @ judgments.square() - (weights @ judgments).square()).mean(-1)


def trained_rows(model: PersonalizedModel, users: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the trained users' rows `[U, p]` and the row of a new user `[p]`, with all tables concatenated.

    Args:
        model: A trained model.
        users: `[U]` row numbers, from 1 on; all by default.
    """
    tables = [table.detach() for table in row_tables(model).values()]
    new = [row.detach()[None] for row in model.user_model.new_rows(tables)]
    return table_rows([table[1:] if users is None else table[users] for table in tables]), table_rows(new)[0]


def _told_apart(model: PersonalizedModel, first: int | None) -> Tensor:
    """Return the row numbers `[U]` that differ from a new user's row; users who were added but not trained do not."""
    tables = [table.detach() for table in row_tables(model).values()]
    differs = [
        # In parts: a table may be as large as the policy.
        torch.cat([(some != new).flatten(1).any(1) for some in torch.split(table[1:], 1 << 12)])
        for table, new in zip(tables, model.user_model.new_rows(tables), strict=True)
    ]
    return 1 + torch.stack(differs).any(0)[:first].nonzero().flatten()


def fit_prior(
    model: PersonalizedModel,
    pairs: PreferenceBatch,
    kinds: int | None = None,
    rank: int = 8,
    first: int | None = None,
) -> UserPrior:
    """Return the prior of new users, fitted to the trained ones; once per model is enough.

    Users who were added but not trained are ignored.

    Args:
        model: A trained model.
        pairs: Pairs like those that new users will judge; their labels are ignored.
        kinds: As in `UserPrior.fit`; by default the number that predicts trained users best. Each kind costs a pass
            over the pairs of new users.
        rank: As in `UserPrior.fit`.
        first: Use only the first so many users of the tables; by default all.
    """
    if (kinds is not None and kinds < 1) or rank < 1:
        raise ConfigurationError(f"kinds is {kinds} and rank {rank}; both must be 1 or more.")
    users = _told_apart(model, first)
    rows, generic = trained_rows(model, users[torch.from_numpy(spread(len(users), _USERS))])
    margins_of = Margins(model, select_pairs(pairs, torch.from_numpy(spread(len(pairs), _PAIRS))))
    judgments = torch.stack([margins_of(row).sigmoid() for row in (generic, *rows)])
    return UserPrior.fit(rows, generic, judgments[1:], kinds, rank, judgments[0], model.user_model.has_unit_prior)


def adapt_users(
    model: PersonalizedModel,
    pairs: PreferenceBatch,
    user_ids: Sequence[str] | None = None,
    prior: UserPrior | None = None,
    steps: int | None = None,
    batch_size: int = 32,
) -> Adapted:
    """Return the rows of users learned from their pairs; the model does not change.

    Args:
        model: A trained model.
        pairs: N pairs of new users, in any order, on any device.
        user_ids: The users; those of the pairs by default. A user without pairs gets exactly the generic row.
        prior: The prior; fitted to the model's users by default.
        steps: Number of linearizations, each a forward and backward pass over the pairs; 0 infers only the kind. By
            default 2 if the prior is known (`UserPrior.is_known`), and else 0, since a guessed spread may do harm.
        batch_size: Pairs in a pass of the policy.

    Raises:
        ConfigurationError: The user model has no user rows, the loss does not rank completions, or a pair's user is not
            in `user_ids`.
    """
    user_ids = users_in(pairs, user_ids)
    margins_of = Margins(model, pairs, batch_size)
    prior = fit_prior(model, pairs) if prior is None else prior
    steps = (_STEPS if prior.is_known else 0) if steps is None else steps
    return _adapt(user_ids, prior, _Layout(user_ids, pairs.user_ids, prior.generic.device), margins_of, steps)


class _Layout:
    """Maps pairs to blocks `[B, n]` with one row per user."""

    def __init__(self, user_ids: Sequence[str], of_pairs: Sequence[str], device: torch.device) -> None:
        number = {user_id: place for place, user_id in enumerate(user_ids)}
        self.user = torch.tensor([number[user_id] for user_id in of_pairs], dtype=torch.long, device=device)
        self.counts = torch.bincount(self.user, minlength=len(user_ids))
        order = self.user.argsort(stable=True)
        start = self.counts.cumsum(0) - self.counts
        self.slot = torch.empty_like(self.user)
        self.slot[order] = torch.arange(len(order), device=device) - start[self.user[order]]
        most = int(self.counts.max()) if len(self.counts) else 0
        self.mask = torch.arange(most, device=device) < self.counts[:, None]

    def block(self, values: Tensor) -> Tensor:
        """Return values of the pairs `[N, ...]` as `[B, n, ...]`, padded with zeros."""
        block = values.new_zeros(*self.mask.shape, *values.shape[1:])
        block[self.user, self.slot] = values
        return block

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each user's pairs, `[B, ...]`."""
        return values.new_zeros(len(self.counts), *values.shape[1:]).index_add(0, self.user, values)


def _under_each_kind(prior: UserPrior, layout: _Layout, margins_of: Margins) -> tuple[Tensor, Tensor]:
    """Score the pairs under each kind, except kinds that a user's first pairs have ruled out.

    Returns:
        `[N, 1 + K]` margins, 0 if not computed, and `[B, 1 + K]` posterior weights.
    """
    first = layout.slot < _FIRST
    under = torch.stack([margins_of(prior.rows(center), only=first) for center in prior.centers], dim=1)

    def log_joint() -> Tensor:
        # A pair that was not scored has margin 0 under every kind, so it does not change the weights.
        return prior.weights.log() + layout.sums(F.logsigmoid(under))

    likely = log_joint().softmax(1) > _RULED_OUT
    likely[:, 0] = True  # the generic user, for comparison
    for kind, center in enumerate(prior.centers):
        under[:, kind] += margins_of(prior.rows(center), only=~first & likely[layout.user, kind])
    return under, log_joint().masked_fill(~likely, -torch.inf).softmax(1)


def _adapt(user_ids: tuple[str, ...], prior: UserPrior, layout: _Layout, margins_of: Margins, steps: int) -> Adapted:
    batch, user = len(user_ids), layout.user
    under, weights = _under_each_kind(prior, layout, margins_of)
    kind = weights.argmax(1)
    modes = prior.centers.expand(batch, -1, -1).clone()
    eye = torch.eye(prior.rank, device=user.device)
    covariances = (prior.stds.square()[:, None, None] * eye).expand(batch, -1, -1, -1).clone()
    center, std = prior.centers[kind], prior.stds[kind]
    codes = center
    for _ in range(steps):
        found, slopes = margins_of.along(prior.directions, prior.rows(codes), user)
        # As a function of the deviation from the kind's center in units of its spread, distributed N(0, I).
        offsets = found - (slopes * (codes - center)[user]).sum(1)
        unit = slopes * std[user][:, None]
        posterior = laplace(layout.block(offsets), layout.block(unit), layout.mask)
        codes = center + std[:, None] * posterior.mode
        every = torch.arange(batch)
        modes[every, kind], covariances[every, kind] = codes, std[:, None, None] ** 2 * posterior.covariance
    mean = torch.einsum("bc,bck->bk", weights, modes)
    # Without pairs, a user is the generic one.
    rows = torch.where((layout.counts > 0)[:, None], prior.rows(mean), prior.generic)
    return Adapted(user_ids, rows, prior, layout.counts, weights, modes, covariances, user, under)


_PAIRS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Encoded:
    """Rows of B users that a user model read from pairs.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: all row tables concatenated.
    """

    user_ids: tuple[str, ...]
    rows: Tensor


@torch.no_grad()
def encode_users(model: PersonalizedModel, pairs: PreferenceBatch, user_ids: Sequence[str] | None = None) -> Encoded:
    """Return the rows of users read from their pairs; the model does not change.

    Other tables, such as those of an `IndividualUserModel` in a composite, get the row of a new user.

    Args:
        model: A trained model.
        pairs: N pairs, in any order, on any device.
        user_ids: The users; those of the pairs by default. A user without pairs gets the row of a new user.

    Raises:
        ConfigurationError: The user model reads no pairs, or a pair's user is not in `user_ids`.
    """
    if not model.user_model.history_size:
        raise ConfigurationError(
            f"encode_users: {type(model.user_model).__name__} reads no pairs; learn users' rows with adapt_users."
        )
    user_ids = users_in(pairs, user_ids)
    by_user: dict[str, list[int]] = {user_id: [] for user_id in user_ids}
    for place, user_id in enumerate(pairs.user_ids):
        by_user[user_id].append(place)
    places = list(by_user.values())
    tables = model.user_model.row_tables()
    pairs = pairs.to(tables[0].device)
    groups = _groups(places)
    found = [_read(model, pairs, [places[user] for user in group]) for group in groups]
    back = torch.tensor([user for group in groups for user in group], dtype=torch.long).argsort()
    new = model.user_model.new_rows(tables)
    rows = {id(table): row.expand(len(user_ids), *row.shape) for table, row in zip(tables, new, strict=True)}
    for table, *parts in zip(model.user_model.history_tables(), *found, strict=True):
        rows[id(table)] = torch.cat(parts)[back]
    return Encoded(user_ids, table_rows(list(rows.values())))


def _groups(places: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group users with similar numbers of pairs, since a block is as wide as its user with most pairs."""
    groups: list[list[int]] = [[]]
    for user in sorted(range(len(places)), key=lambda user: len(places[user])):
        if groups[-1] and (len(groups[-1]) + 1) * len(places[user]) > _PAIRS_AT_ONCE:
            groups.append([])
        groups[-1].append(user)
    return groups


def _read(model: PersonalizedModel, pairs: PreferenceBatch, places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the history rows of users with pairs at `places`."""
    pause()
    most = max(map(len, places), default=0)
    index = torch.tensor([[*own, *[-1] * (most - len(own))] for own in places], dtype=torch.long)
    history = pool_history(model.policy, PairTokens(*(_block(part, index) for part in (pairs.chosen, pairs.rejected))))
    return model.user_model.history_rows(history)


def _block(tokens: Tokens, index: Tensor) -> Tokens:
    """Return the rows `[B, K]` of tokens, empty where `index` is -1."""
    index = index.to(tokens.ids.device)
    return Tokens(tokens.ids[index], tokens.mask[index] & (index >= 0)[..., None])
