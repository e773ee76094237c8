"""Users' codes, estimated from their feedback alone by a linear model of texts, before the policy is trained.

A few dozen pairs of a user say little about a whole soft prompt, and a policy that is trained together with its users'
codes fits their noise. A linear model that all users share says what can be said: with `x_i` the features of text i,

    v_ui = a_u + b_i + q_i . z_u + noise,    (b_i, q_i) = W x_i + e_i,    z_u ~ N(0, I)

where `v_ui` is 1 for a text that user u chose and -1 for one that u rejected. `W` judges texts that nobody has judged
before, `e_i` learns what the features do not show of texts that many judge. It is a Gaussian low-rank model with side
information (Koren et al. 2009; Agarwal and Chen 2009), fitted by alternating least squares.

Shapes: V votes, U users, M texts, D features, k dimensions of a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDS, _CG_STEPS = 12, 8
_HELD_OUT = 0.1
_USERS_AT_ONCE = 1 << 15  # bounds the memory of their k x k systems
_BUCKETS = 1 << 16  # of hashed n-grams
_NGRAMS = (1, 2)
_LENGTH = 0.3  # scale of the length, between that of one latent feature (0.1) and of all (1)
_OVERSAMPLING, _POWER_ITERATIONS = 10, 2  # of the randomized SVD (Halko et al. 2011)
_OF_TEXTS = 2.0  # precision of b_i's own part, in units of the noise


@dataclass(frozen=True)
class Precisions:
    """Precisions of the priors, in units of the noise: the more, the closer to no personalization.

    Attributes:
        codes: Of a user's code.
        weights: Of `W`, how much features may say.
        texts: Of `e_i`, how much a text may differ from what its features say.
    """

    codes: float
    weights: float
    texts: float


#: From strong personalization to hardly any. The second hardly uses the features: it is for texts that many judge.
CANDIDATES = (
    Precisions(2.0, 10.0, 20.0),
    Precisions(6.0, 1e4, 6.0),
    Precisions(6.0, 30.0, 20.0),
    Precisions(6.0, 100.0, 20.0),
    Precisions(20.0, 100.0, 20.0),
    Precisions(20.0, 300.0, 60.0),
    Precisions(60.0, 1000.0, 200.0),
)


@dataclass(frozen=True)
class UserCodes:
    """What votes say about users' codes; over all users, mean and uncertainty together have variance 1.

    Attributes:
        mean: `[U, k]` float32 expected codes; 0 for a user without votes.
        std: `[U, k]` float32 standard deviation of each number; 1 for a user without votes.
        explained: Share of the squared error of votes left out of the fit that the codes remove; 0 or less where
            there is nothing that this model could personalize.
    """

    mean: Tensor
    std: Tensor
    explained: float


@torch.no_grad()
def estimate_codes(
    users: Tensor, texts: Tensor, values: Tensor, features: Tensor, num_users: int, rank: int
) -> UserCodes:
    """Return users' codes, with the priors' precisions chosen by votes that are left out. Deterministic.

    Args:
        users: `[V]` int64 user of each vote, below `num_users`.
        texts: `[V]` int64 text of each vote. A user may judge a text several times; the mean counts.
        values: `[V]` float 1 for chosen or liked, -1 for rejected or disliked.
        features: `[M, D]` float32 features of the texts, as of `text_features`.
        num_users: U.
        rank: k.
    """
    keys, of = torch.unique(users * len(features) + texts, return_inverse=True)
    means = torch.zeros(len(keys)).index_add_(0, of, values.float()) / torch.bincount(of)
    votes = _Votes(keys // len(features), keys % len(features), means)
    draw = torch.Generator().manual_seed(0)
    held = torch.rand(len(keys), generator=draw) < _HELD_OUT
    chosen, explained = CANDIDATES[-1], 0.0
    if held.any() and not held.all():
        kept, out = votes.select(~held), votes.select(held)
        fits = [_Factors(num_users, features, rank, precisions).fit(kept) for precisions in CANDIDATES]
        without, with_codes = zip(*(fit.squared_errors(out) for fit in fits), strict=True)
        number = _most_cautious(torch.stack(with_codes))
        chosen = CANDIDATES[number]
        explained = 1 - float(with_codes[number].mean() / without[number].mean().clamp(min=1e-12))
    return _Factors(num_users, features, rank, chosen).fit(votes).codes(votes, explained)


def _most_cautious(errors: Tensor) -> int:
    """Return the last candidate that is within one standard error of the best (Breiman et al. 1984).

    Args:
        errors: `[C, n]` errors of candidates, from the least to the most cautious.
    """
    behind = errors - errors[errors.mean(1).argmin()]
    within = behind.mean(1) <= behind.std(1, correction=0) / errors.shape[1] ** 0.5
    return int(within.nonzero()[-1])


@torch.no_grad()
def text_features(ids: Tensor, lengths: Tensor, size: int = 128) -> Tensor:
    """Return features of texts, `[M, min(size, M) + 1]` float32: latent semantic ones, and the length.

    By a randomized SVD (Halko et al. 2011) of the square roots of the counts of hashed tokens and pairs of tokens,
    weighted by inverse document frequency, one unit vector per text (latent semantic analysis, Deerwester et al. 1990),
    scaled to a mean square norm of 1. The last column is 0.3 times the standardized logarithm of the length.

    Args:
        ids: `[S]` int64 token ids of all texts, one after the other.
        lengths: `[M]` number of tokens of each text.
        size: Most latent features.
    """
    texts = len(lengths)
    text_of, hashed = _ngrams(ids, lengths)
    cells, counts = torch.unique(text_of * _BUCKETS + hashed, return_counts=True)
    rows, columns = cells // _BUCKETS, cells % _BUCKETS
    frequency = torch.bincount(columns, minlength=_BUCKETS) / max(texts, 1)
    weights = counts.sqrt() * (1 / frequency[columns].clamp(min=1e-3)).log().clamp(min=0.05)
    norms = torch.zeros(texts).index_add_(0, rows, weights.square()).sqrt()
    weights = weights / norms[rows]
    starts = F.pad(torch.bincount(rows, minlength=texts).cumsum(0), (1, 0))[:-1]

    def times(matrix: Tensor) -> Tensor:  # the n-grams' matrix [M, buckets] times [buckets, n]
        return F.embedding_bag(columns, matrix, starts, mode="sum", per_sample_weights=weights)

    def transposed_times(matrix: Tensor) -> Tensor:  # in blocks, since it makes one row for each cell
        result = torch.zeros(_BUCKETS, matrix.shape[1])
        for some in torch.split(torch.arange(len(rows)), 1 << 18):
            result.index_add_(0, columns[some], weights[some, None] * matrix[rows[some]])
        return result

    sketch = torch.randn(_BUCKETS, size + _OVERSAMPLING, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_ITERATIONS):
        sketch = transposed_times(torch.linalg.qr(times(sketch))[0])
    span = torch.linalg.qr(times(sketch))[0]
    directions = torch.linalg.svd(transposed_times(span), full_matrices=False)[0]
    found = times(directions[:, : min(size, texts)].contiguous())
    length = lengths.float().log1p()
    length = _LENGTH * (length - length.mean()) / length.std(correction=0).clamp(min=1e-6)
    return torch.cat([found / found.square().sum(1).mean().sqrt().clamp(min=1e-6), length[:, None]], dim=1)


def _ngrams(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the text and the hash of each n-gram."""
    text_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    texts, hashes = [], []
    running = torch.zeros_like(ids)
    for size in range(1, max(_NGRAMS) + 1):
        # The hash of the n-gram that starts at each token; it must not reach into the next text.
        running = running[: len(ids) - size + 1] * 1_000_003 + ids[size - 1 :] + 1
        running = running % 2_147_483_647
        inside = text_of[: len(running)] == text_of[size - 1 :]
        if size in _NGRAMS:
            texts.append(text_of[: len(running)][inside])
            hashes.append((running[inside] * 2_654_435_761 % 2_147_483_647) % _BUCKETS)
    return torch.cat(texts), torch.cat(hashes)


@dataclass(frozen=True)
class _Votes:
    """Votes, sorted by user."""

    users: Tensor
    texts: Tensor
    values: Tensor

    def select(self, which: Tensor) -> _Votes:
        return _Votes(self.users[which], self.texts[which], self.values[which])


@dataclass(frozen=True)
class _Systems:
    """The linear systems of a block of n users: their codes solve `matrices @ code = right`."""

    users: slice
    matrices: Tensor  # [n, k, k]
    right: Tensor  # [n, k]


class _Factors:
    """The model of this file; column 0 of the texts' factors is `b_i`, the others are `q_i`."""

    def __init__(self, num_users: int, features: Tensor, rank: int, precisions: Precisions) -> None:
        draw = torch.Generator().manual_seed(0)
        self.features, self.rank, self.precisions = features, rank, precisions
        self.weights = torch.zeros(features.shape[1], rank + 1)
        self.own = F.pad(0.1 * torch.randn(len(features), rank, generator=draw), (1, 0))
        self.codes_of = 0.1 * torch.randn(num_users, rank, generator=draw)
        self.offsets = torch.zeros(num_users)

    @property
    def factors(self) -> Tensor:
        """`[M, 1 + k]`."""
        return self.features @ self.weights + self.own

    def fit(self, votes: _Votes) -> _Factors:
        counts = torch.bincount(votes.users, minlength=len(self.codes_of))
        for _ in range(_ROUNDS):
            residual = votes.values - (self.factors[votes.texts] * self._extended(votes)).sum(1)
            self.offsets = torch.zeros(len(counts)).index_add_(0, votes.users, residual) / (counts + 1)
            self._fit_texts(votes)
            for block in self._systems(votes):
                self.codes_of[block.users] = torch.linalg.solve(block.matrices, block.right)
        return self

    def squared_errors(self, votes: _Votes) -> tuple[Tensor, Tensor]:
        """Return the squared errors of votes without and with codes, `[V]` each."""
        factors = self.factors[votes.texts]
        generic = votes.values - self.offsets[votes.users] - factors[:, 0]
        own = generic - (factors[:, 1:] * self.codes_of[votes.users]).sum(1)
        return generic.square(), own.square()

    def codes(self, votes: _Votes, explained: float) -> UserCodes:
        """Return the codes' means and spreads in a basis in which the users' codes have covariance I."""
        noise = self.squared_errors(votes)[1].mean()
        users = len(self.codes_of)
        has_votes = torch.bincount(votes.users, minlength=users) > 0
        known = int(has_votes.sum())
        covariance = self.codes_of[has_votes].T @ self.codes_of[has_votes] / known
        for block in self._systems(votes):
            covariance += noise * torch.linalg.inv(block.matrices)[has_votes[block.users]].sum(0) / known
        values, vectors = torch.linalg.eigh(covariance.double())
        # The direction that differs most between users first.
        turn = (vectors / values.clamp(min=1e-12).sqrt()).float().flip(1)
        std = torch.ones(users, self.rank)
        for block in self._systems(votes):
            spread = noise * turn.T @ torch.linalg.inv(block.matrices) @ turn
            std[block.users] = spread.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        mean = torch.where(has_votes[:, None], self.codes_of @ turn, 0.0)
        return UserCodes(mean, torch.where(has_votes[:, None], std, 1.0), explained)

    def _extended(self, votes: _Votes) -> Tensor:
        return F.pad(self.codes_of, (1, 0), value=1.0)[votes.users]

    def _systems(self, votes: _Votes) -> Iterator[_Systems]:
        """Yield the users' linear systems in blocks, which bounds memory."""
        factors = self.factors
        for start in range(0, len(self.codes_of), _USERS_AT_ONCE):
            users = slice(start, min(start + _USERS_AT_ONCE, len(self.codes_of)))
            first, end = torch.searchsorted(votes.users, torch.tensor([users.start, users.stop])).tolist()
            texts, row = votes.texts[first:end], votes.users[first:end]
            left = votes.values[first:end] - self.offsets[row] - factors[texts, 0]
            loadings = factors[texts, 1:]
            matrices = (self.precisions.codes * torch.eye(self.rank)).repeat(users.stop - start, 1, 1)
            matrices.index_add_(0, row - start, loadings[:, :, None] * loadings[:, None, :])
            right = torch.zeros(len(matrices), self.rank).index_add_(0, row - start, left[:, None] * loadings)
            yield _Systems(users, matrices, right)

    def _fit_texts(self, votes: _Votes) -> None:
        """Improve `W` and `e` jointly by preconditioned conjugate gradients, from where they are."""
        extended, values = self._extended(votes), votes.values - self.offsets[votes.users]
        penalties = torch.full((self.rank + 1,), self.precisions.texts)
        penalties[0] = _OF_TEXTS
        scales = torch.cat(
            [
                torch.full((self.features.shape[1], self.rank + 1), self.precisions.weights),
                penalties.expand_as(self.own),
            ]
        )

        def gathered(per_vote: Tensor) -> Tensor:
            own = torch.zeros_like(self.own).index_add_(0, votes.texts, per_vote)
            return torch.cat([self.features.T @ own, own])

        def applied(point: Tensor) -> Tensor:
            weights, own = point.tensor_split([len(self.weights)])
            predicted = ((self.features @ weights + own)[votes.texts] * extended).sum(1)
            return gathered(predicted[:, None] * extended) + scales * point

        squares = torch.zeros_like(self.own).index_add_(0, votes.texts, extended.square())
        diagonal = torch.cat([self.features.square().T @ squares, squares]) + scales
        point = torch.cat([self.weights, self.own])
        residual = gathered(values[:, None] * extended) - applied(point)
        direction = preconditioned = residual / diagonal
        size = (residual * preconditioned).sum()
        for _ in range(_CG_STEPS):
            image = applied(direction)
            step = size / (direction * image).sum().clamp(min=1e-30)
            point, residual = point + step * direction, residual - step * image
            preconditioned = residual / diagonal
            size, before = (residual * preconditioned).sum(), size
            direction = preconditioned + size / before.clamp(min=1e-30) * direction
        self.weights, self.own = point.tensor_split([len(self.weights)])
