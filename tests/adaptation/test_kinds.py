"""How many kinds of users there are, and what is expected of a new one, against users drawn from known kinds."""

from __future__ import annotations

import pytest
import torch

from prlhf_lightning.adaptation import Adapted, UserPrior
from prlhf_lightning.adaptation.prior import choose_kinds, medoids_of

PAIRS = 32


def population(sizes, seed=0, noise=0.3):
    """Judgments of users of some tastes, each of which is a direction of its own, and their tastes."""
    draw = torch.Generator().manual_seed(seed)
    tastes = 2.0 * torch.randn(len(sizes), PAIRS, generator=draw, dtype=torch.float64)
    kind = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    margins = tastes[kind] + noise * torch.randn(len(kind), PAIRS, generator=draw, dtype=torch.float64)
    return margins.sigmoid(), kind


@pytest.mark.parametrize("sizes", [[40], [20, 20], [30, 12, 8, 5], [8] * 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_there_are_as_many_kinds_as_tastes_and_none_is_missed(sizes, seed):
    judgments, kind = population(sizes, seed)
    count = choose_kinds(judgments, torch.full((PAIRS,), 0.5, dtype=torch.float64))
    found = kind[medoids_of(torch.cdist(judgments, judgments), count)]
    assert set(found.tolist()) == set(range(len(sizes)))
    assert count <= len(sizes) + 1


@pytest.mark.parametrize(("users", "pairs"), [(0, 5), (1, 5), (2, 5), (9, 1), (9, 0)])
def test_few_users_or_pairs_have_a_kind_too(users, pairs):
    count = choose_kinds(torch.rand(users, pairs, dtype=torch.float64), torch.rand(pairs, dtype=torch.float64))
    assert 1 <= count <= max(1, users)


def test_a_kind_is_a_users_row_with_any_number_of_directions():
    draw = torch.Generator().manual_seed(0)
    rows, judgments = torch.randn(20, 50, generator=draw), population([5] * 4)[0].float()
    prior = UserPrior.fit(rows, torch.ones(50), judgments, kinds=4, rank=2)
    centers = prior.rows(prior.centers)[1:]
    assert torch.cdist(centers, rows).amin(1).max() < 1e-4
    gram = prior.directions @ prior.directions.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-4, rtol=0)


def test_a_known_prior_keeps_its_variance_in_and_between_kinds():
    draw = torch.Generator().manual_seed(0)
    rows, judgments = 0.3 * torch.randn(60, 4, generator=draw), population([15] * 4)[0].float()
    prior = UserPrior.fit(rows, torch.zeros(4), judgments, kinds=4, is_unit=True)
    torch.testing.assert_close(prior.directions @ prior.directions.T, torch.eye(4), atol=1e-5, rtol=0)
    weights = prior.weights[1:] / prior.weights[1:].sum()
    between = (weights[:, None] * prior.centers[1:].square()).sum(0).mean()
    assert prior.std**2 + float(between) == pytest.approx(1.0, abs=1e-4)
    assert UserPrior.fit(rows, torch.zeros(4), judgments, kinds=4).std * 0.3 < 0.6  # the rows' own, which is smaller


def known(prior, weights):
    """What is known of users of whom only their kinds' probabilities are."""
    users, kinds = weights.shape
    codes = prior.centers.expand(users, -1, -1)
    covariances = torch.zeros(users, kinds, prior.rank, prior.rank)
    nothing = torch.zeros(0, kinds)
    ids = tuple(map(str, range(users)))
    counts = torch.zeros(users, dtype=torch.long)
    return Adapted(ids, prior.rows(codes[:, 0]), prior, counts, weights, codes, covariances, counts[:0], nothing)


def test_expected_accuracy_is_what_users_of_these_kinds_reach():
    judgments, _ = population([6, 3, 3])
    prior = UserPrior.fit(torch.randn(12, 5), torch.zeros(5), judgments.float(), kinds=3)
    weights = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0]])
    found = known(prior, weights)
    draw = torch.Generator().manual_seed(0)
    guess = weights @ prior.judgments > 0.5
    for user in range(2):
        kinds = torch.multinomial(weights[user], 4000, replacement=True, generator=draw)
        answers = torch.rand(4000, PAIRS, generator=draw) < prior.judgments[kinds]
        right = (answers == guess[user]).float().mean(1)
        by_kind = torch.stack([right[kinds == kind].mean() for kind in range(4)]).nan_to_num()
        spread = (weights[user] * (by_kind - right.mean()).square()).sum().sqrt()
        assert float(found.expected_accuracy[user]) == pytest.approx(float(right.mean()), abs=0.01)
        assert float(found.expected_accuracy_std[user]) == pytest.approx(float(spread), abs=0.02)


def test_a_kind_is_settled_only_once_it_is_certain():
    judgments, _ = population([6, 3, 3])
    prior = UserPrior.fit(torch.randn(12, 5), torch.zeros(5), judgments.float(), kinds=3)
    certain = torch.eye(len(prior.weights))[1]
    found = known(prior, torch.stack([prior.weights, (prior.weights + certain) / 2, certain]))
    first, some, last = found.settled.tolist()
    assert (first, last) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert 0.05 < some < 0.95
