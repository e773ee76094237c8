"""Low-rank heads of all users, fitted to pairs of fixed features by variational expectation-maximization.

The reward of text t for user u is `r(t, u) = φ_t · (w_0 + B z_u)` (LoRe, arXiv:2504.14439). Its parameters have priors:
`z_u ~ N(0, I)`, so that a user of whom little is known stays near the generic user; and Gaussian priors on `w_0` and on
the columns of `B`. A pair has the Bradley-Terry likelihood `σ(r(chosen, u) - r(rejected, u))`.

Shapes: N pairs, T texts, U users, k directions, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.rewards.features import TextFeatures

#: Precision of the prior of `w_0`.
GENERIC_PRECISION = 20.0
#: Precisions of the prior of `B` to choose from. The larger, the less users differ.
PRECISIONS = (50.0, 100.0, 200.0, 400.0, 800.0)
_STEPS, _STEPS_OF_TRIAL, _STEPS_OF_CODES = 100, 60, 10
_RATE, _START = 0.05, 0.05
_NUMBERS_AT_ONCE = 1 << 23
_RANK_OF_TRIAL = 8  # the best precision depends little on the rank
_HELD_OUT = 4  # every fourth judged text of a user


@dataclass(frozen=True)
class IndexedPairs:
    """Pairs as numbers.

    Attributes:
        users: `[N]` int64 row of each pair's user.
        chosen: `[N]` int64 index of the preferred text.
        rejected: `[N]` int64 index of the other one.
        weights: `[N]` float32.
        threshold: Index of the text with which thumbs are compared, as in `JudgedPairs`; -1 for none.
    """

    users: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    threshold: int = -1

    def __len__(self) -> int:
        """Return the number of pairs, N."""
        return len(self.users)

    @classmethod
    def weighted(cls, users: Tensor, chosen: Tensor, rejected: Tensor, threshold: int = -1) -> IndexedPairs:
        """Return pairs with the weights of `pair_weights`."""
        return cls(users, chosen, rejected, pair_weights(users, chosen, rejected), threshold)

    def part(self, rows: Tensor) -> IndexedPairs:
        """Return the pairs `rows`, with the weights they have here."""
        return IndexedPairs(
            self.users[rows], self.chosen[rows], self.rejected[rows], self.weights[rows], self.threshold
        )

    def select(self, rows: Tensor) -> IndexedPairs:
        """Return the pairs `rows`, with weights of their own."""
        return self.weighted(self.users[rows], self.chosen[rows], self.rejected[rows], self.threshold)


@dataclass(frozen=True)
class FittedHead:
    """A head for each user.

    Attributes:
        weights: `[D, 1 + k]` the generic user's weights `w_0`, then the columns of `B`.
        codes: `[U, k]` posterior means of `z_u`; 0 for a user without pairs.
        covariances: `[U, k, k]` their posterior covariances.
        loss: Mean weighted loss of the last step.
    """

    weights: Tensor
    codes: Tensor
    covariances: Tensor
    loss: float = float("nan")


def pair_weights(users: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the weight of each pair, `[N]` in (0, 1], at which each text that a user judged counts once.

    Pairs made of ratings, votes or rankings repeat the same judgments: n texts make up to n²/4 pairs, but hold no more
    than n - 1 independent comparisons. A pair of texts that stand in a and b pairs of this user weighs
    `min(1, 1/a + 1/b)`. Pairs that share no text weigh 1.

    Args:
        users: `[N]` int64 rows of users.
        chosen: `[N]` int64 numbers of texts.
        rejected: `[N]` int64 numbers of texts.
    """
    if not len(users):
        return torch.zeros(0, device=users.device)
    texts = 1 + torch.maximum(chosen.max(), rejected.max())
    judgments = torch.cat([users * texts + chosen, users * texts + rejected])
    _, place, counts = torch.unique(judgments, return_inverse=True, return_counts=True)
    first, second = counts[place].float().chunk(2)
    weights: Tensor = (1 / first + 1 / second).clamp(max=1.0)
    return weights


def fit_codes(
    generic: Tensor, slopes: Tensor, pairs: IndexedPairs, codes: Tensor, covariances: Tensor, steps: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the Gaussian posteriors of all codes: means `[U, k]` and covariances `[U, k, k]`.

    The posterior under the quadratic bound of the logistic function, which each step tightens (Jaakkola and Jordan
    2000, Eq. 7 to 13). A step is a ridge regression for each user, and never makes the bound worse.

    Args:
        generic: `[N]` margin of each pair at code 0.
        slopes: `[N, k]` derivative of the margin by the code.
        pairs: The pairs; users' rows are below U.
        codes: `[U, k]` means to start from.
        covariances: `[U, k, k]` covariances to start from.
        steps: Number of steps; about 20 from the prior reach the optimum.
    """
    dims = codes.shape[1]
    eye = torch.eye(dims, dtype=codes.dtype, device=codes.device)
    blocks = list(_blocks(pairs.users, len(codes), dims))
    for _ in range(steps):
        margin = generic + (slopes * codes[pairs.users]).sum(1)
        precisions, shifts = torch.zeros_like(covariances), torch.zeros_like(codes)
        for users, rows, mask in blocks:
            x = slopes[rows]
            variance = ((x @ covariances[users]) * x).sum(2)
            xi = (margin[rows].square() + variance).clamp(min=1e-12).sqrt()
            weights = pairs.weights[rows].to(codes.dtype) * mask
            curvature = weights * torch.tanh(xi / 2) / (2 * xi)
            precisions[users] = x.mT @ (curvature[..., None] * x)
            shifts[users] = (x.mT @ (weights / 2 - curvature * generic[rows])[..., None])[..., 0]
        covariances = torch.linalg.inv(precisions + eye)
        codes = torch.einsum("ukl,ul->uk", covariances, shifts)
    return codes, covariances


def _blocks(users: Tensor, num_users: int, dims: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield users `[B]` with pairs, the places of their pairs `[B, n]`, and which of these are real, `[B, n]` bool.

    Users with similar numbers of pairs stand together, and a block has a limited number of pairs.
    """
    order, counts = users.argsort(stable=True), torch.bincount(users, minlength=num_users)
    starts = counts.cumsum(0) - counts
    left = counts.argsort(descending=True)[: int((counts > 0).sum())]
    while len(left):
        most = int(counts[left[0]])
        size = max(1, _NUMBERS_AT_ONCE // (most * dims))
        some, left = left[:size], left[size:]
        slots = torch.arange(most, device=users.device)
        mask = slots < counts[some, None]
        yield some, order[(starts[some, None] + slots).clamp(max=len(order) - 1)], mask


def fit_head(
    features: TextFeatures,
    pairs: IndexedPairs,
    num_users: int,
    rank: int,
    precision: float,
    alpha: float = 1.0,
    seed: int = 0,
    steps: int = _STEPS,
    report: Callable[[int], None] = lambda step: None,
) -> FittedHead:
    """Return heads fitted to pairs.

    Every few steps, the codes' posteriors are computed in closed form (`fit_codes`). Between, `w_0` and `B` take steps
    of Adam on the loss of all pairs, with codes drawn from these posteriors in each step: the gradient is that of the
    expected log-likelihood, so that `B` does not learn what single users' codes have memorized. The loss of a pair is
    `alpha * l(u) + (1 - alpha) * l(u_0)`, as in P-DPO (arXiv:2402.05133).

    Args:
        features: Features of the texts.
        pairs: The pairs.
        num_users: U.
        rank: k; 0 fits the generic user alone.
        precision: Of the prior of the entries of `B`.
        alpha: Weight of the user's own term, in [0, 1].
        seed: Of the start of `B` and of the drawn codes.
        steps: Number of Adam's steps.
        report: Called after each step with its number.
    """
    draw = torch.Generator().manual_seed(seed)
    device = features.vectors.device
    # Users must differ a little at the start: at B = 0, codes have no effect and stay at 0.
    weights = torch.randn(features.size, 1 + rank, generator=draw) * _START
    weights[:, 0] = 0.0
    weights = weights.to(device).requires_grad_()
    precisions = torch.full((1 + rank,), precision, device=device)
    precisions[0] = min(precision, GENERIC_PRECISION)
    codes = torch.zeros(num_users, rank, device=device)
    covariances = torch.eye(rank, device=device).expand(num_users, rank, rank).contiguous()
    optimizer = torch.optim.Adam([weights], lr=_RATE)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
        if rank and step % _STEPS_OF_CODES == 0:
            with torch.no_grad():
                generic, slopes = _margins(features, pairs, weights)
                codes, covariances = fit_codes(generic, slopes, pairs, codes, covariances)
                spread = torch.linalg.cholesky(covariances)
        generic, slopes = _margins(features, pairs, weights)
        own = generic
        if rank:
            noise = torch.randn(num_users, rank, 1, generator=draw).to(device)
            own = generic + (slopes * (codes + (spread @ noise)[..., 0])[pairs.users]).sum(1)
        losses = -alpha * F.logsigmoid(own) - (1 - alpha) * F.logsigmoid(generic)
        fit = (pairs.weights * losses).sum()
        total = fit + (precisions * weights.square()).sum() / 2
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss = fit.detach()
        report(step)
    if rank:
        with torch.no_grad():
            generic, slopes = _margins(features, pairs, weights)
            codes, covariances = fit_codes(generic, slopes, pairs, codes, covariances, 5)
    return FittedHead(weights.detach(), codes, covariances, float(loss) / max(float(pairs.weights.sum()), 1e-12))


def choose_precision(
    features: TextFeatures,
    pairs: IndexedPairs,
    num_users: int,
    rank: int,
    alpha: float = 1.0,
    seed: int = 0,
    candidates: Sequence[float] = PRECISIONS,
    report: Callable[[int], None] = lambda step: None,
) -> float:
    """Return the precision that predicts judgments of held-out texts best; the middle one if nothing can be held out.

    Args:
        features: As for `held_out_likelihoods`, also the other arguments.
        pairs: The pairs.
        num_users: U.
        rank: k.
        alpha: Weight of the user's own term.
        seed: Seed of the fits and of what is held out.
        candidates: Precisions to choose from.
        report: Called after each of the steps of all fits.
    """
    found = held_out_likelihoods(features, pairs, num_users, rank, candidates, alpha, seed, report)
    return max(found, key=found.__getitem__) if found else candidates[len(candidates) // 2]


def held_out_likelihoods(
    features: TextFeatures,
    pairs: IndexedPairs,
    num_users: int,
    rank: int,
    candidates: Sequence[float] = PRECISIONS,
    alpha: float = 1.0,
    seed: int = 0,
    report: Callable[[int], None] = lambda step: None,
) -> dict[float, float]:
    """Return the log-likelihood of held-out judgments under each precision; nothing if none can be held out.

    About every fourth text that a user judged is held out from this user; other users' judgments of it are not. Pairs
    of two such texts are predicted, and pairs of none are fitted. A pair of one text of each kind is not used: the fit
    knows the user's opinion of one of them, from the noise of that judgment too. The threshold of thumbs, which all
    of a user's thumbs tell about, is not held out.

    Args:
        features: As for `fit_head`, also the next arguments.
        pairs: The pairs.
        num_users: U.
        rank: k.
        candidates: Precisions; at `math.inf` all users are alike.
        alpha: Weight of the user's own term.
        seed: Seed of the fits and of what is held out.
        report: Called after each of the steps of all fits.
    """
    out = _held_out_texts(pairs, seed)
    train, test = (pairs.select((out == number).nonzero().flatten()) for number in (0, 2))
    if not len(train) or not len(test):
        return {}

    def log_likelihood(precision: float) -> float:
        dims = min(rank, _RANK_OF_TRIAL) if math.isfinite(precision) else 0
        head = fit_head(features, train, num_users, dims, precision, alpha, seed, _STEPS_OF_TRIAL, report)
        generic, slopes = _margins(features, test, head.weights)
        margins = generic + (slopes * head.codes[test.users]).sum(1)
        return float((test.weights * F.logsigmoid(margins)).sum())

    return {precision: log_likelihood(precision) for precision in candidates}


def steps_in_all(chooses: bool) -> int:
    """Return the number of steps of a fit, with or without the choice of the precision."""
    return _STEPS + (len(PRECISIONS) * _STEPS_OF_TRIAL if chooses else 0)


def steps_of_trial() -> int:
    """Return the number of steps of the fit for one more candidate."""
    return _STEPS_OF_TRIAL


def _margins(features: TextFeatures, pairs: IndexedPairs, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs' margins at code 0, `[N]`, and their slopes `[N, k]`."""
    scores = features.scores(weights)
    margins = scores[pairs.chosen] - scores[pairs.rejected]
    return margins[:, 0], margins[:, 1:]


def _held_out_texts(pairs: IndexedPairs, seed: int) -> Tensor:
    """Return how many of each pair's texts are held out from its user, `[N]`: none (0), one of two (1), or all (2)."""

    def is_out(text: Tensor) -> Tensor:
        # A hash of user and text; the multipliers are large primes.
        return (pairs.users * 2_654_435_761 + text * 40_503 + seed * 97) % 1_000_003 % _HELD_OUT == 0

    chosen, rejected = is_out(pairs.chosen), is_out(pairs.rejected)
    chosen = torch.where(pairs.chosen == pairs.threshold, rejected, chosen)
    rejected = torch.where(pairs.rejected == pairs.threshold, chosen, rejected)
    return chosen.long() + rejected.long()
