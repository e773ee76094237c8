"""Heads of new users of a reward model, in closed form, and how certain they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.adaptation.cold_start import COUNTS, ColdStartPoint, cold_start_points, information_gain
from prlhf_lightning.data.splits import spread
from prlhf_lightning.rewards import JudgedPairs, RewardModel
from prlhf_lightning.rewards.fitting import pair_weights

_DRAWS = 256  # of codes from a posterior
_PAIRS = 256  # on which judgments are predicted


@dataclass(frozen=True)
class AdaptedHeads:
    """B new users of a reward model, with N pairs in all.

    Attributes:
        user_ids: The users.
        rows: `[B, k]` their codes: means of the posteriors `N(rows, covariances)`, under the prior `N(0, I)`.
        covariances: `[B, k, k]`.
        counts: `[B]` pairs of each user.
        users: `[N]` index of each pair's user.
        generic_margins: `[N]` margin of each pair under the generic user.
        slopes: `[N, k]` derivative of the margin by the code.
        weights: `[N]` weight of each pair, at which a text that a user judged counts once.
        expected_accuracy: `[B]` expected pair accuracy of each user's head, computed by the model itself.
        expected_accuracy_std: `[B]` standard deviation of that accuracy, from the uncertainty about the code.
        settled: `[B]` share of the prior variance of each user's judgments that their pairs have removed.
    """

    user_ids: tuple[str, ...]
    rows: Tensor
    covariances: Tensor
    counts: Tensor
    users: Tensor
    generic_margins: Tensor
    slopes: Tensor
    weights: Tensor
    expected_accuracy: Tensor
    expected_accuracy_std: Tensor
    settled: Tensor

    def left_out(self) -> Tensor:
        """Return the leave-one-out probability `[N]` of each pair given its user's others.

        A pair's part of the posterior is the quadratic bound of Jaakkola and Jordan (2000, Eq. 7), which is subtracted
        (Sherman and Morrison 1950). The margin's distribution without it is Gaussian (MacKay 1992, Eq. 10).
        """
        mean, variance = _predicted(self.slopes, self.rows[self.users], self.covariances[self.users])
        margins = self.generic_margins + mean
        xi = (margins.square() + variance).clamp(min=1e-12).sqrt()
        curvature = self.weights * torch.tanh(xi / 2) / (2 * xi)
        shift = self.weights / 2 - curvature * self.generic_margins
        rest = 1 - curvature * variance
        without = self.generic_margins + (mean - shift * variance) / rest
        return (without / (1 + torch.pi / 8 * variance / rest).sqrt()).sigmoid()


@torch.no_grad()
def adapt_heads(model: RewardModel, pairs: JudgedPairs) -> AdaptedHeads:
    """Return new users of a reward model, learned from their pairs; the model does not change.

    Args:
        model: A trained reward model with a `LowRankUserModel`.
        pairs: Pairs of new users.

    Raises:
        ConfigurationError: The user model has no codes.
    """
    generic, slopes = model.linear_margins(pairs)
    vocabulary, codes, covariances = model.new_users(pairs, (generic, slopes))
    users = vocabulary.rows(pairs.user_ids).to(codes.device) - 1
    codes, covariances = codes[1:], covariances[1:]
    some = torch.from_numpy(spread(len(pairs), _PAIRS)).to(codes.device)
    noise = _noise(codes.shape[1]).to(codes)
    open_before = _judgments(generic[some], slopes[some], noise).var(0, correction=0).mean()
    found = []
    for code, factor in zip(codes, torch.linalg.cholesky(covariances), strict=True):
        chances = _judgments(generic[some], slopes[some], code + noise @ factor.T)  # [S, M]
        accuracies = torch.where(chances.mean(0) > 0.5, chances, 1 - chances).mean(1)
        settled = 1 - chances.var(0, correction=0).mean() / open_before.clamp(min=1e-12)
        found.append(torch.stack([accuracies.mean(), accuracies.std(correction=0), settled]))
    counts = torch.bincount(users, minlength=len(codes))
    weights = pair_weights(users, pairs.chosen.to(users.device), pairs.rejected.to(users.device))
    expected = torch.stack(found).unbind(1)
    return AdaptedHeads(vocabulary.ids, codes, covariances, counts, users, generic, slopes, weights, *expected)


@torch.no_grad()
def cold_start_heads(
    model: RewardModel, pairs: JudgedPairs, held_out: JudgedPairs, counts: Sequence[int] = COUNTS
) -> list[ColdStartPoint]:
    """Return the accuracy on held-out pairs of new users after increasing numbers of pairs; see `cold_start`.

    Args:
        model: A trained reward model with a `LowRankUserModel`.
        pairs: Pairs of unknown users, for each user in order of use.
        held_out: Other pairs of the same users.
        counts: Numbers of pairs per user; counts too large for most users are left out.

    Raises:
        ConfigurationError: The user model has no codes.
    """
    learned, (generic, slopes) = model.linear_margins(pairs), model.linear_margins(held_out)

    def margins_after(first: Tensor, _: tuple[str, ...]) -> Tensor:
        if not len(first):
            return generic
        users, codes, _covariances = model.new_users(pairs.select(first), (learned[0][first], learned[1][first]))
        rows = users.rows(held_out.user_ids).to(codes.device)  # 0, whose code is 0, for users who are not learned
        return generic + (slopes * codes[rows]).sum(1)

    return cold_start_points(pairs.user_ids, held_out.user_ids, generic, margins_after, counts)


@torch.no_grad()
def suggest_pairs(model: RewardModel, adapted: AdaptedHeads, pool: JudgedPairs, count: int) -> tuple[Tensor, Tensor]:
    """Return the most informative pairs of a pool for each user, best first: BALD (arXiv:1112.5745, Eq. 2).

    Args:
        model: The model that the users were adapted to.
        adapted: B users.
        pool: M pairs in any order; their users are ignored.
        count: Number of pairs per user; fewer if the pool is smaller.

    Returns:
        `[B, n]` positions in the pool, and `[B, n]` their information in bits.
    """
    generic, slopes = model.linear_margins(pool)
    noise = _noise(slopes.shape[1]).to(slopes)
    equal = noise.new_full((1, _DRAWS), 1 / _DRAWS)
    found = []
    for code, factor in zip(adapted.rows, torch.linalg.cholesky(adapted.covariances), strict=True):
        margins = generic[:, None] + slopes @ (code + noise @ factor.T).T  # [M, S]
        found.append(information_gain(equal, margins)[0].topk(min(count, len(pool))))
    return torch.stack([one.indices for one in found]), torch.stack([one.values for one in found])


def _noise(rank: int) -> Tensor:
    """Return draws from N(0, I), `[S, k]`; the same for all users, so that differences between them are not noise."""
    half = torch.randn(_DRAWS // 2, rank, generator=torch.Generator().manual_seed(0))
    return torch.cat([half, -half])


def _judgments(generic: Tensor, slopes: Tensor, codes: Tensor) -> Tensor:
    """Return the probabilities of M judgments under codes `[S, k]`, `[S, M]`."""
    return (generic + codes @ slopes.T).sigmoid()


def _predicted(slopes: Tensor, codes: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of `slopes · z` for each of N pairs, `[N]` each."""
    variance = torch.einsum("nk,nkl,nl->n", slopes, covariances, slopes)
    return (slopes * codes).sum(1), variance
