"""Codes estimated from users' judgments alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prlhf_lightning.user_models import factorization
from prlhf_lightning.user_models.factorization import estimate_codes, text_features

USERS, TEXTS, RANK = 80, 60, 2


def crowd(strength: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Users, texts and values of 3000 judgments, and the users' true codes `[80, 2]`."""
    draw = torch.Generator().manual_seed(seed)
    codes, factors = torch.randn(USERS, RANK, generator=draw), torch.randn(TEXTS, RANK, generator=draw)
    users, texts = (torch.randint(size, (3000,), generator=draw) for size in (USERS, TEXTS))
    scores = strength * (codes[users] * factors[texts]).sum(1) + torch.randn(3000, generator=draw)
    return users, texts, scores.sign(), codes


def no_features(texts: int = TEXTS) -> Tensor:
    return torch.zeros(texts, 4)


def test_planted_codes_are_found_up_to_a_rotation():
    users, texts, values, truth = crowd(strength=2.0)
    found = estimate_codes(users, texts, values, no_features(), USERS, RANK)
    solution = torch.linalg.lstsq(found.mean, truth).solution
    error = (found.mean @ solution - truth).square().mean() / truth.square().mean()
    assert error < 0.25
    assert found.explained > 0.2


def test_users_of_chance_are_not_told_apart():
    users, texts, values, _ = crowd(strength=0.0)
    found = estimate_codes(users, texts, values, no_features(), USERS, RANK)
    assert found.explained < 0.02
    assert found.mean.square().mean() < 0.2


def test_features_place_texts_that_only_one_user_judged():
    draw = torch.Generator().manual_seed(0)
    users = torch.arange(2000) % USERS
    features = torch.randn(2000, 4, generator=draw)  # each text is judged once
    codes = torch.randn(USERS, 1, generator=draw)
    values = (codes[users, 0] * features[:, 0]).sign()
    found = estimate_codes(users, torch.arange(2000), values, features, USERS, 1)
    correlation = torch.corrcoef(torch.stack([found.mean[:, 0], codes[:, 0].sign()]))[0, 1]
    assert correlation.abs() > 0.9


def test_over_all_users_mean_and_uncertainty_have_variance_one():
    users, texts, values, _ = crowd(strength=1.0)
    found = estimate_codes(users, texts, values, no_features(), USERS, RANK)
    torch.testing.assert_close((found.mean.square() + found.std.square()).mean(0), torch.ones(RANK), atol=0.02, rtol=0)


def test_a_user_without_judgments_has_the_prior():
    users, texts, values, _ = crowd(strength=1.0)
    found = estimate_codes(users, texts, values, no_features(), USERS + 1, RANK)
    assert torch.equal(found.mean[-1], torch.zeros(RANK))
    assert torch.equal(found.std[-1], torch.ones(RANK))


def test_more_judgments_leave_less_uncertainty():
    users, texts, values, _ = crowd(strength=1.0)
    few = (users != 0) | (torch.arange(len(users)) < 300)  # user 0 keeps about a tenth of the judgments
    stds = [
        estimate_codes(users[some], texts[some], values[some], no_features(), USERS, RANK).std[0].mean()
        for some in (few, torch.ones_like(few))
    ]
    assert stds[0] > 1.1 * stds[1]


def test_the_fit_is_a_stationary_point_of_the_penalized_squares(monkeypatch):
    monkeypatch.setattr(factorization, "_ROUNDS", 200)
    users, texts, values, _ = crowd(strength=1.0)
    order = users.argsort(stable=True)
    features = torch.randn(TEXTS, 4, generator=torch.Generator().manual_seed(1))
    precisions = factorization.Precisions(6.0, 10.0, 6.0)
    votes = factorization._Votes(users[order], texts[order], values[order])
    model = factorization._Factors(USERS, features, RANK, precisions).fit(votes)
    parts = [part.double().requires_grad_() for part in (model.offsets, model.weights, model.own, model.codes_of)]
    offsets, weights, own, codes = parts
    factors = features.double() @ weights + own
    predicted = offsets[votes.users] + factors[votes.texts, 0] + (factors[votes.texts, 1:] * codes[votes.users]).sum(1)
    of_own = own[:, 0].square().sum() * 2.0 + own[:, 1:].square().sum() * precisions.texts
    loss = (votes.values - predicted).square().sum() + of_own + weights.square().sum() * precisions.weights
    loss = loss + codes.square().sum() * precisions.codes + offsets.square().sum()
    for gradient in torch.autograd.grad(loss / 2, parts):
        assert gradient.abs().max() < 0.02


def test_blocks_of_users_change_nothing(monkeypatch):
    users, texts, values, _ = crowd(strength=1.0)
    whole = estimate_codes(users, texts, values, no_features(), USERS, RANK)
    monkeypatch.setattr(factorization, "_USERS_AT_ONCE", 7)
    torch.testing.assert_close(estimate_codes(users, texts, values, no_features(), USERS, RANK).mean, whole.mean)


def test_repeated_judgments_of_a_text_count_by_their_mean():
    users, texts, values, _ = crowd(strength=1.0)
    once = estimate_codes(users, texts, values, no_features(), USERS, RANK)
    twice = estimate_codes(users.repeat(2), texts.repeat(2), values.repeat(2), no_features(), USERS, RANK)
    torch.testing.assert_close(twice.mean, once.mean)


@pytest.mark.parametrize("judgments", [1, 2, 3])
def test_a_handful_of_judgments_is_no_error(judgments):
    users = torch.arange(judgments) % 2
    found = estimate_codes(users, torch.arange(judgments), torch.ones(judgments), no_features(judgments), 2, 8)
    assert found.mean.isfinite().all()
    assert found.std.isfinite().all()


# ---- features of texts


def features_of(*texts: list[int], size: int = 8) -> Tensor:
    """The latent features."""
    lengths = torch.tensor([len(text) for text in texts])
    return text_features(torch.tensor([token for text in texts for token in text]), lengths, size)[:, :-1]


def test_texts_that_share_words_are_closer():
    features = features_of([1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 9], [6, 7, 8, 10])
    similar = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert similar[0, 1] > similar[0, 2] + 0.2
    assert similar[2, 3] > similar[1, 3] + 0.2


def test_the_order_of_words_counts():
    features = features_of([1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 7, 8])
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_features_have_a_mean_square_norm_of_one():
    features = features_of([1, 2], [3], [1, 4, 5])
    assert features.shape == (3, 3)
    assert math.isclose(features.square().sum(1).mean(), 1.0, rel_tol=1e-5)


def test_the_last_feature_is_the_standardized_length():
    lengths = torch.tensor([1, 3, 7])
    length = text_features(torch.arange(11), lengths)[:, -1]
    expected = (lengths + 1).double().log()
    standardized = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(length.double(), 0.3 * standardized, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_inner_products_are_those_of_the_exact_decomposition():
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 30, (12,), generator=draw).tolist() for _ in range(9)]
    whole = features_of(*texts, size=9)  # as many as texts: nothing is lost
    cells, counts = torch.unique(
        torch.stack(
            factorization._ngrams(torch.tensor([token for text in texts for token in text]), torch.tensor([12] * 9))
        ),
        dim=1,
        return_counts=True,
    )
    matrix = torch.zeros(9, factorization._BUCKETS).double().index_put_(tuple(cells), counts.double().sqrt())
    matrix *= (9 / (matrix > 0).sum(0).clamp(min=1)).log().clamp(min=0.05)
    matrix /= matrix.norm(dim=1, keepdim=True)
    torch.testing.assert_close(whole @ whole.T, (matrix @ matrix.T).float(), atol=2e-3, rtol=0)


def test_no_ngram_reaches_into_the_next_text():
    alone = factorization._ngrams(torch.tensor([1, 2]), torch.tensor([2]))
    beside = factorization._ngrams(torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
    assert torch.equal(alone[1], beside[1][beside[0] == 0])
    assert (beside[0] == 1).sum() == 1
