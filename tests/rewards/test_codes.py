"""Codes estimated from users' judgments alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from prlhf_lightning.rewards import JudgedPairs, TextTable, codes, estimate_codes
from prlhf_lightning.user_models.base import UserCodes

USERS, TEXTS, RANK = 80, 60, 2


def table(texts: int = TEXTS) -> TextTable:
    """Texts of one word each, which say nothing about the others."""
    return TextTable.of(([1], [10 + text]) for text in range(texts))[0]


def judged(rewards: Tensor, per_user: int = 40, seed: int = 1) -> tuple[JudgedPairs, Tensor]:
    """Pairs of users over texts with rewards `[U, T]`, Bradley-Terry noise, and the users' rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(rewards)).repeat_interleave(per_user)
    first, second = torch.randint(rewards.shape[1], (2, len(rows)), generator=draw)
    second = (second + (first == second)) % rewards.shape[1]
    wins = torch.rand(len(rows), generator=draw) < (rewards[rows, first] - rewards[rows, second]).sigmoid()
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    return JudgedPairs(tuple(map(str, rows.tolist())), chosen, rejected, table(rewards.shape[1])), rows


def crowd(strength: float) -> tuple[JudgedPairs, Tensor, Tensor]:
    """Pairs of 80 users, their rows, and the users' true codes `[80, 2]`."""
    draw = torch.Generator().manual_seed(0)
    truth, factors = torch.randn(USERS, RANK, generator=draw), torch.randn(TEXTS, RANK, generator=draw)
    return *judged(strength * truth @ factors.T), truth


@cache
def estimated() -> tuple[UserCodes, Tensor]:
    """Codes of users who differ a little, and the true ones."""
    pairs, rows, truth = crowd(strength=1.0)
    return estimate_codes(pairs, rows, USERS, RANK), truth


def rest_after(found: Tensor, truth: Tensor) -> float:
    """Share of the true codes' variance that no rotation or scaling of the found ones gives."""
    return float((found @ torch.linalg.lstsq(found, truth).solution - truth).square().mean() / truth.square().mean())


def test_planted_codes_are_found_up_to_a_rotation():
    pairs, rows, truth = crowd(strength=2.0)
    found = estimate_codes(pairs, rows, USERS, RANK)
    assert rest_after(found.mean, truth) < 0.25
    assert found.explained > 0.15


def test_users_of_chance_are_not_told_apart():
    pairs, rows, _ = crowd(strength=0.0)
    found = estimate_codes(pairs, rows, USERS, RANK)
    assert found.explained < 0.02
    assert found.mean.square().mean() < 0.2


def test_the_truth_is_as_far_off_as_the_uncertainty_says():
    found, truth = estimated()
    turn = torch.linalg.lstsq(truth, found.mean).solution
    turn = turn @ torch.linalg.inv(torch.linalg.cholesky(turn.T @ turn)).T  # nearest map that keeps the covariance
    errors = (truth @ turn - found.mean) / found.std
    assert 0.6 < errors.square().mean() < 1.6


def test_the_first_direction_moves_rewards_most():
    draw = torch.Generator().manual_seed(0)
    truth, factors = torch.randn(USERS, 2, generator=draw), torch.randn(TEXTS, 2, generator=draw)
    pairs, rows = judged(truth * torch.tensor([0.7, 2.0]) @ factors.T)
    correlation = torch.corrcoef(torch.stack([estimate_codes(pairs, rows, USERS, 1).mean[:, 0], truth[:, 1]]))[0, 1]
    assert correlation.abs() > 0.8


def test_words_place_texts_that_only_one_user_judged():
    draw = torch.Generator().manual_seed(0)
    taste = torch.randn(20, generator=draw).sign()
    words = torch.randint(10, 20, (1600, 6), generator=draw)  # each text is judged once
    rewards = (words == 10).sum(1)
    rows = torch.arange(800) % 20
    wins = taste[rows] * (rewards[0::2] - rewards[1::2]) + 0.1 * torch.randn(800, generator=draw) > 0
    texts, index = TextTable.of(([1], text) for text in words.tolist())
    chosen, rejected = torch.where(wins, index[0::2], index[1::2]), torch.where(wins, index[1::2], index[0::2])
    found = estimate_codes(JudgedPairs(tuple(map(str, rows.tolist())), chosen, rejected, texts), rows, 20, 1)
    assert torch.corrcoef(torch.stack([found.mean[:, 0], taste]))[0, 1].abs() > 0.9


def test_over_all_users_mean_and_uncertainty_have_variance_one():
    found, _ = estimated()
    torch.testing.assert_close((found.mean.square() + found.std.square()).mean(0), torch.ones(RANK), atol=0.1, rtol=0)


def test_a_user_without_judgments_has_the_prior():
    pairs, rows, _ = crowd(strength=1.0)
    found = estimate_codes(pairs, rows + 1, USERS + 1, RANK)
    assert torch.equal(found.mean[0], torch.zeros(RANK))
    assert torch.equal(found.std[0], torch.ones(RANK))


def test_more_judgments_leave_less_uncertainty():
    pairs, rows, _ = crowd(strength=1.0)
    few = ((rows != 0) | (torch.arange(len(rows)) < 4)).nonzero().flatten()  # user 0 keeps a tenth of the pairs
    fewer = estimate_codes(pairs.select(few), rows[few], USERS, RANK)
    assert fewer.std[0].mean() > 1.1 * estimated()[0].std[0].mean()


def test_users_outside_the_sample_get_codes_too(monkeypatch):
    pairs, rows, truth = crowd(strength=2.0)
    monkeypatch.setattr(codes, "_USERS", 50)
    monkeypatch.setattr(codes, "_PAIRS", 1000)
    found = estimate_codes(pairs, rows, USERS, RANK)
    assert rest_after(found.mean, truth) < 0.3


def test_the_same_pairs_give_the_same_codes():
    pairs, rows, _ = crowd(strength=1.0)
    again = estimate_codes(pairs, rows, USERS, RANK)
    assert torch.equal(estimated()[0].mean, again.mean)
    assert torch.equal(estimated()[0].std, again.std)


def test_thumbs_tell_tastes_from_leniency():
    draw = torch.Generator().manual_seed(0)
    truth, factors = torch.randn(USERS, 1, generator=draw), 2 * torch.randn(TEXTS, 1, generator=draw)
    leniency = 2 * torch.randn(USERS, 1, generator=draw)
    rows = torch.arange(USERS).repeat_interleave(30)
    texts = torch.randint(TEXTS, (len(rows),), generator=draw)
    likes = torch.rand(len(rows), generator=draw) < (truth @ factors.T + leniency)[rows, texts].sigmoid()
    threshold = torch.full_like(texts, TEXTS)
    chosen, rejected = torch.where(likes, texts, threshold), torch.where(likes, threshold, texts)
    pairs = JudgedPairs(tuple(map(str, rows.tolist())), chosen, rejected, table(TEXTS + 1), TEXTS)
    found = estimate_codes(pairs, rows, USERS, 1)
    assert found.explained > 0.1
    assert torch.corrcoef(torch.stack([found.mean[:, 0], truth[:, 0]]))[0, 1].abs() > 0.8


@pytest.mark.parametrize("judgments", [1, 2, 3])
def test_a_handful_of_judgments_is_no_error(judgments):
    pairs, rows = judged(torch.zeros(judgments, 3), per_user=1)
    found = estimate_codes(pairs, rows, judgments, 8)
    assert found.mean.isfinite().all()
    assert found.std.isfinite().all()
