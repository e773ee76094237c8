"""Heads fitted to pairs, against numerical optima and data with known heads."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from prlhf_lightning.adaptation.laplace import laplace
from prlhf_lightning.rewards import TextFeatures, choose_precision, fit_codes, fit_head, pair_weights
from prlhf_lightning.rewards.fitting import IndexedPairs

USERS, TEXTS, WIDTH = 30, 60, 12


def features(texts=TEXTS, known=0):
    vectors = F.normalize(torch.randn(texts, WIDTH), dim=1)
    nobody = torch.zeros(texts, dtype=torch.long)
    return TextFeatures(vectors, nobody, torch.arange(1, 1 + texts) if known else nobody, 0, known)


def judged(scores, per_user=60):
    """Pairs of U users over T texts with scores `[U, T]`, and Bradley-Terry noise."""
    users = torch.arange(len(scores)).repeat_interleave(per_user)
    first, second = torch.randint(scores.shape[1], (2, len(users)))
    second = (second + (first == second)) % scores.shape[1]
    wins = torch.rand(len(users)) < (scores[users, first] - scores[users, second]).sigmoid()
    return IndexedPairs.weighted(users, torch.where(wins, first, second), torch.where(wins, second, first))


def accuracy(head, found, pairs, generic=False):
    scores = found.scores(head.weights)
    margins = scores[pairs.chosen] - scores[pairs.rejected]
    codes = 0 * head.codes if generic else head.codes
    return float(((margins[:, 0] + (margins[:, 1:] * codes[pairs.users]).sum(1)) > 0).float().mean())


def opposed_users():
    found = features()
    direction = 8 * torch.randn(WIDTH)
    sides = torch.tensor([1.0, -1.0]).repeat(USERS // 2)
    return found, sides[:, None] * (found.vectors @ direction)


def test_opposed_users_get_opposed_heads():
    found, scores = opposed_users()
    train, test = judged(scores), judged(scores)
    head = fit_head(found, train, USERS, rank=2, precision=1.0)
    assert accuracy(head, found, test) > 0.8 > 0.65 > accuracy(head, found, test, generic=True)


def test_users_who_agree_lose_nothing_by_having_heads():
    found = features()
    scores = (found.vectors @ (8 * torch.randn(WIDTH))).expand(USERS, -1)
    train, test = judged(scores, 20), judged(scores)
    head = fit_head(found, train, USERS, rank=4, precision=100.0)
    assert accuracy(head, found, test) >= accuracy(head, found, test, generic=True) - 0.01


def test_codes_are_near_an_independent_laplace_approximation():
    slopes, offsets = torch.randn(2, 40, 3, dtype=torch.float64), torch.randn(2, 40, dtype=torch.float64)
    expected = laplace(offsets, slopes, torch.ones(2, 40, dtype=torch.bool))
    pairs = IndexedPairs(torch.arange(2).repeat_interleave(40), *torch.zeros(2, 80, dtype=torch.long), torch.ones(80))
    start = torch.zeros(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    codes, covariances = fit_codes(offsets.flatten(), slopes.flatten(0, 1), pairs, *start, steps=50)
    # The mean of the posterior and its mode differ by less than its standard deviation.
    assert (codes - expected.mode).abs().max() < 0.5 * expected.std.min()
    assert torch.allclose(covariances.diagonal(dim1=1, dim2=2).sqrt(), expected.std, rtol=0.3)


def test_codes_maximize_the_bound_of_the_likelihood():
    slopes, offsets = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    pairs = IndexedPairs(*torch.zeros(3, 30, dtype=torch.long), torch.rand(30, dtype=torch.float64))
    start = torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
    codes, covariances = fit_codes(offsets, slopes, pairs, *start, steps=200)

    def bound(mean, factor):
        margin = offsets + slopes @ mean
        xi = (margin.square() + (slopes @ factor).square().sum(1)).sqrt()
        fit = (pairs.weights * (F.logsigmoid(xi) + (margin - xi) / 2)).sum()
        prior = (mean.square().sum() + factor.square().sum()) / 2 - factor.logdet()
        return fit - prior

    mean, factor = codes[0].clone().requires_grad_(), torch.linalg.cholesky(covariances[0]).requires_grad_()
    gradients = torch.autograd.grad(bound(mean, factor), (mean, factor))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


def test_a_user_without_pairs_is_the_generic_user():
    found, scores = opposed_users()
    train = judged(scores)
    head = fit_head(found, train, USERS + 1, rank=2, precision=1.0, steps=20)
    assert torch.equal(head.codes[USERS], torch.zeros(2))
    assert torch.equal(head.covariances[USERS], torch.eye(2))


def test_a_users_weights_sum_to_the_number_of_judged_texts():
    chosen, rejected = (part.flatten() for part in torch.meshgrid(torch.arange(4), torch.arange(4, 9), indexing="ij"))
    weights = pair_weights(torch.zeros(20, dtype=torch.long), chosen, rejected)
    assert float(weights.sum()) == pytest.approx(9.0)


def test_pairs_without_common_texts_weigh_one():
    weights = pair_weights(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1]))
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_the_order_of_pairs_changes_nothing():
    found, scores = opposed_users()
    pairs, order = judged(scores), torch.randperm(USERS * 60)
    heads = [fit_head(found, p, USERS, 2, 1.0, steps=12) for p in (pairs, pairs.select(order))]
    assert torch.allclose(heads[0].codes, heads[1].codes, atol=1e-3)


def test_a_strong_prior_is_chosen_where_users_agree():
    found = features()
    scores = (found.vectors @ torch.randn(WIDTH)).expand(USERS, -1)
    assert choose_precision(found, judged(scores, 200), USERS, 4, candidates=(20.0, 2000.0)) == 2000.0


def test_a_weak_prior_is_chosen_where_users_differ():
    found, scores = opposed_users()
    assert choose_precision(found, judged(scores), USERS, 2, candidates=(0.3, 300.0)) == 0.3


def test_scores_are_the_products_of_dense_features():
    found = replace(features(known=TEXTS), prompt=torch.randint(3, (TEXTS,)), prompts=2)
    weights = torch.randn(found.size, 4)
    assert torch.allclose(found.scores(weights), found.dense(torch.arange(TEXTS)) @ weights, atol=1e-5)
