"""New users' rows from a handful of pairs each, everything else frozen.

For every user, in two parts: which kind of user is it (the pairs are scored under each kind), and how does it differ
from its kind (margins are linearized there, and the Bayesian logistic regression that is left is solved exactly in few
dimensions). Passes of the policy over the pairs are all that costs anything; all users share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.adaptation.laplace import laplace
from prlhf_lightning.adaptation.margins import Margins, row_tables, select_pairs, table_rows, users_in
from prlhf_lightning.adaptation.pauses import pause
from prlhf_lightning.adaptation.prior import UserPrior
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel, pool_history
from prlhf_lightning.types import PairTokens, PreferenceBatch, Tokens

# A kind that is less likely than this after a user's first pairs is not looked at again.
_FIRST, _RULED_OUT = 4, 1e-3
# Enough to tell kinds of users apart, and a few seconds' work.
_USERS, _PAIRS = 64, 32


@dataclass(frozen=True)
class Adapted:
    """What was learned of B users, of N pairs in all.

    The posterior of a user's code is a mixture of Gaussians, of which the row is the mean.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: the numbers of all row tables side by side.
        prior: What was taken for known before the pairs.
        counts: `[B]` pairs of each user.
        weights: `[B, 1 + K]` posterior probability of each kind; the first is the generic user.
        modes: `[B, 1 + K, k]` each kind's most probable code.
        covariances: `[B, 1 + K, k, k]` each kind's covariance about it.
        users: `[N]` place of each pair's user.
        under: `[N, 1 + K]` reward margin of each pair under each kind, 0 where the kind was ruled out before.
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
    def uncertainty(self) -> Tensor:
        """`[B]` root mean square of the dimensions' standard deviations; the trained users' spread is about 1."""
        return self.covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=0).sqrt()

    @property
    def expected_accuracy(self) -> Tensor:
        """`[B]` pair accuracy that is to be expected of each user's row, by what the model thinks of them so far.

        On the pairs of `prior.judgments`, which are the same for all users. It is right as far as the model's margins
        are calibrated.
        """
        return (self.weights * self._accuracies).sum(1)

    @property
    def expected_accuracy_std(self) -> Tensor:
        """`[B]` standard deviation of that accuracy, since the user may be of one kind or of another."""
        away = self._accuracies - self.expected_accuracy[:, None]
        return (self.weights * away.square()).sum(1).sqrt()

    @property
    def _accuracies(self) -> Tensor:
        """`[B, 1 + K]` pair accuracy of what is believed of each user, if they are of one kind."""
        chances = self.prior.judgments
        first = self.weights @ chances > 0.5  # [B, M]
        return torch.where(first[:, None], chances, 1 - chances).mean(2)

    @property
    def settled(self) -> Tensor:
        """`[B]` from 0 to 1, how much of what was open about each user their pairs have settled.

        That is the share by which the variance of what they would judge, over the kinds that they may be of, is smaller
        than before the first pair. It may fall below 0 where the first pairs point away from the usual kinds.
        """
        before = _open(self.prior.weights, self.prior.judgments)
        return 1 - _open(self.weights, self.prior.judgments) / before.clamp(min=1e-12)

    def left_out(self) -> Tensor:
        """Return the probability `[N]` that the user's other pairs give each one: leave-one-out, of the kinds alone."""
        evidence = F.logsigmoid(self.under)
        others = (self.weights.log()[self.users] - evidence).softmax(1)
        return (others * self.under.sigmoid()).sum(1)

    @property
    def std(self) -> Tensor:
        """`[B, p]` posterior standard deviation of each number of a row."""
        directions = self.prior.directions
        return torch.einsum("kp,bkl,lp->bp", directions, self.covariance, directions).clamp(min=0).sqrt()


def _open(weights: Tensor, judgments: Tensor) -> Tensor:
    """Return the variance over kinds `[1 + K, M]` of weights `[..., 1 + K]`, mean over pairs, `[...]`."""
    return (weights @ judgments.square() - (weights @ judgments).square()).mean(-1)


def trained_rows(model: PersonalizedModel, users: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the trained users' rows `[U, p]` and the row of a new one `[p]`, of all tables side by side.

    Args:
        model: A trained model.
        users: `[U]` rows of the tables, from 1 on; all by default.
    """
    tables = [table.detach() for table in row_tables(model).values()]
    new = [row.detach()[None] for row in model.user_model.new_rows(tables)]
    return table_rows([table[1:] if users is None else table[users] for table in tables]), table_rows(new)[0]


def _told_apart(model: PersonalizedModel, first: int | None) -> Tensor:
    """Return which rows `[U]` of the tables are not those of a new user, as theirs are who were added, not trained."""
    tables = [table.detach() for table in row_tables(model).values()]
    differs = [
        # Some at a time: a table may be as large as the policy.
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
    """Fit what is known of a new user to the trained ones; once for a model is enough.

    Users who have the row of a new one, as they were added and not trained, are no evidence of what users are like.

    Args:
        model: A trained model.
        pairs: Some pairs like those that new users will judge; who preferred which is not looked at.
        kinds: As in `UserPrior.fit`, by default as many as predict trained users best; each costs every new user a pass
            over their pairs.
        rank: As in `UserPrior.fit`.
        first: Go by so many users, who come first in the tables; by default by all.
    """
    if (kinds is not None and kinds < 1) or rank < 1:
        raise ConfigurationError(f"kinds is {kinds} and rank {rank}; both must be 1 or more.")
    users = _told_apart(model, first)
    rows, generic = trained_rows(model, users[torch.from_numpy(spread(len(users), _USERS))])
    margins_of = Margins(model, select_pairs(pairs, torch.from_numpy(spread(len(pairs), _PAIRS))))
    judgments = torch.stack([margins_of(row).sigmoid() for row in (generic, *rows)])
    return UserPrior.fit(rows, generic, judgments[1:], kinds, rank, judgments[0])


def adapt_users(
    model: PersonalizedModel,
    pairs: PreferenceBatch,
    user_ids: Sequence[str] | None = None,
    prior: UserPrior | None = None,
    steps: int = 0,
    batch_size: int = 32,
) -> Adapted:
    """Learn users from their pairs; the model is left as it is.

    Args:
        model: A trained model.
        pairs: N pairs of new users, in any order, on any device.
        user_ids: The users; those of the pairs by default. One without a pair gets the generic row, bit by bit.
        prior: What is known before the pairs; fitted to the model's users by default.
        steps: Linearizations, each a forward and backward pass over the pairs; 0 settles only the kind.
        batch_size: Pairs in a pass of the policy.

    Raises:
        ConfigurationError: The user model has no rows of users, the loss ranks no completions, or a pair is of a user
            who is not among those that are named.
    """
    user_ids = users_in(pairs, user_ids)
    margins_of = Margins(model, pairs, batch_size)
    prior = fit_prior(model, pairs) if prior is None else prior
    return _adapt(user_ids, prior, _Layout(user_ids, pairs.user_ids, prior.generic.device), margins_of, steps)


class _Layout:
    """Where each pair stands in blocks `[B, n]` that have a row a user."""

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
        """Return values of the pairs `[N, ...]` as `[B, n, ...]`, zero where there is none."""
        block = values.new_zeros(*self.mask.shape, *values.shape[1:])
        block[self.user, self.slot] = values
        return block

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each user's pairs, `[B, ...]`."""
        return values.new_zeros(len(self.counts), *values.shape[1:]).index_add(0, self.user, values)


def _under_each_kind(prior: UserPrior, layout: _Layout, margins_of: Margins) -> tuple[Tensor, Tensor]:
    """Score the pairs under each kind, but for kinds that a user's first pairs have ruled out.

    Returns:
        `[N, 1 + K]` margins, 0 where they were not computed, and `[B, 1 + K]` posterior weights.
    """
    first = layout.slot < _FIRST
    under = torch.stack([margins_of(prior.rows(center), only=first) for center in prior.centers], dim=1)

    def log_joint() -> Tensor:
        # A pair that was not scored has the margin 0 under every kind, which tells none from another.
        return prior.weights.log() + layout.sums(F.logsigmoid(under))

    likely = log_joint().softmax(1) > _RULED_OUT
    likely[:, 0] = True  # the generic user, to compare with
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
        # As a function of the deviation from the kind's center in units of its spread, which is N(0, I).
        offsets = found - (slopes * (codes - center)[user]).sum(1)
        unit = slopes * std[user][:, None]
        posterior = laplace(layout.block(offsets), layout.block(unit), layout.mask)
        codes = center + std[:, None] * posterior.mode
        every = torch.arange(batch)
        modes[every, kind], covariances[every, kind] = codes, std[:, None, None] ** 2 * posterior.covariance
    mean = torch.einsum("bc,bck->bk", weights, modes)
    # Without pairs a user is the generic one, whatever kinds there are.
    rows = torch.where((layout.counts > 0)[:, None], prior.rows(mean), prior.generic)
    return Adapted(user_ids, rows, prior, layout.counts, weights, modes, covariances, user, under)


_PAIRS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Encoded:
    """What was read of B users.

    Attributes:
        user_ids: The users.
        rows: `[B, p]` their rows: the numbers of all row tables side by side.
    """

    user_ids: tuple[str, ...]
    rows: Tensor


@torch.no_grad()
def encode_users(model: PersonalizedModel, pairs: PreferenceBatch, user_ids: Sequence[str] | None = None) -> Encoded:
    """Read users off their pairs; the model is left as it is.

    Tables that pairs say nothing of, such as those of an `IndividualUserModel` beside, get the rows of a new user.

    Args:
        model: A trained model.
        pairs: N pairs, in any order, on any device.
        user_ids: The users; those of the pairs by default. One without a pair gets the row of a new user.

    Raises:
        ConfigurationError: The user model reads no pairs, or a pair is of a user who is not among those that are named.
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
    """Divide users for blocks that have as many pairs a user as the one who has most: those with about as many."""
    groups: list[list[int]] = [[]]
    for user in sorted(range(len(places)), key=lambda user: len(places[user])):
        if groups[-1] and (len(groups[-1]) + 1) * len(places[user]) > _PAIRS_AT_ONCE:
            groups.append([])
        groups[-1].append(user)
    return groups


def _read(model: PersonalizedModel, pairs: PreferenceBatch, places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the history rows of users whose pairs stand at `places`."""
    pause()
    most = max(map(len, places), default=0)
    index = torch.tensor([[*own, *[-1] * (most - len(own))] for own in places], dtype=torch.long)
    history = pool_history(model.policy, PairTokens(*(_block(part, index) for part in (pairs.chosen, pairs.rejected))))
    return model.user_model.history_rows(history)


def _block(tokens: Tokens, index: Tensor) -> Tokens:
    """Return the rows `[B, K]` of tokens, empty where `index` is -1."""
    index = index.to(tokens.ids.device)
    return Tokens(tokens.ids[index], tokens.mask[index] & (index >= 0)[..., None])
