"""Small models of tastes, against brute force and where the answer is known."""

import numpy as np
import pytest
import torch

from prlhf_lightning.analysis.personalization_gain import (
    SMALL,
    bootstrap,
    folds,
    known_from_others,
    mean_over_users,
    personalization_gain,
    scheme_for,
)
from prlhf_lightning.analysis.preference_models import FeaturePreferences, ItemPreferences, PreferenceModel
from prlhf_lightning.analysis.votes import Votes


def simulated(taste, users=100, items=20, per_user=20, seed=0, dimensions=2):
    """Votes by scores that all share, and tastes of a given size; each half of them, to train on and to hold out."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=items)
    own = taste * draw.normal(size=(users, dimensions)) @ draw.normal(size=(dimensions, items))
    who = np.repeat(np.arange(users), 2 * per_user)
    first = draw.integers(items, size=len(who))
    second = (first + draw.integers(1, items, size=len(who))) % items
    margin = scores[first] - scores[second] + own[who, first] - own[who, second]
    wins = draw.random(len(who)) < 1 / (1 + np.exp(-margin))
    votes = Votes(who, np.where(wins, first, second), np.where(wins, second, first), users, items)
    return votes[np.arange(len(who)) % 2 == 0], votes[np.arange(len(who)) % 2 == 1]


def slow_loss(scores, own, votes):
    """Log-loss of scores `[I]` and of what users add `[U, I]`."""
    utility = scores + own
    margin = utility[votes.users, votes.winners] - utility[votes.users, votes.losers]
    return (1 + (-margin).exp()).log().sum()


def descended(parameters, objective, steps=4000, rate=0.02):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@pytest.fixture(scope="module")
def few():
    return simulated(1.0, users=4, items=5, per_user=10)[0]


def test_scores_are_those_of_a_slow_bradley_terry(few):
    fast = ItemPreferences().shared(few, ridge=0.5)
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    descended([scores], lambda: slow_loss(scores, torch.zeros(4, 5), few) + 0.25 * scores.square().sum(), 600, 0.05)
    torch.testing.assert_close(fast.scores, scores.detach(), atol=1e-3, rtol=0)


def test_the_low_rank_term_is_as_good_as_under_the_trace_norm(few):
    family = ItemPreferences()
    model = family.personal(few, family.shared(few, 0.5), 0.5, 0.8, rank=4)
    own = model.tastes @ model.items.T
    reached = (
        slow_loss(model.scores, own, few) + 0.25 * model.scores.square().sum() + 0.8 * torch.linalg.svdvals(own).sum()
    )
    scores = model.scores.clone().requires_grad_()
    free = (own + 0.01 * torch.randn(4, 5)).requires_grad_()
    convex = descended(
        [scores, free],
        lambda: slow_loss(scores, free, few) + 0.25 * scores.square().sum() + 0.8 * torch.linalg.svdvals(free).sum(),
        steps=800,
    )
    assert reached.item() == pytest.approx(convex, abs=5e-3)


def test_slopes_are_those_of_slow_ridge_regressions(few):
    features = torch.randn(5, 2, dtype=torch.float64)
    family = FeaturePreferences(features)
    model = family.personal(few, family.shared(few, 0.1), 0.1, 2.0, rank=2)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    own = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    descended(
        [weights, own],
        lambda: (
            slow_loss(features @ weights, own @ features.T, few) + 0.05 * weights.square().sum() + own.square().sum()
        ),
        600,
        0.05,
    )
    torch.testing.assert_close(model.scores, features @ weights.detach(), atol=2e-3, rtol=0)
    torch.testing.assert_close(model.tastes, own.detach(), atol=2e-3, rtol=0)


def test_only_the_largest_ridge_leaves_no_taste(few):
    family = ItemPreferences()
    shared = family.shared(few, 0.5)
    largest = family.ridges(few, shared)[-1]
    sizes = [float(family.personal(few, shared, 0.5, f * largest, 4).tastes.norm()) for f in (1.1, 0.9)]
    assert sizes[0] < 0.02 < 0.1 < sizes[1]


def test_truncation_keeps_the_largest_part():
    model = PreferenceModel(torch.zeros(6), torch.randn(5, 4).double(), torch.randn(6, 4).double())
    cut = model.truncated(2)
    u, s, v = torch.linalg.svd(model.tastes @ model.items.T)
    torch.testing.assert_close(cut.tastes @ cut.items.T, u[:, :2] * s[:2] @ v[:2])


def test_tastes_that_are_there_are_found():
    train, test = simulated(taste=1.0)
    found = personalization_gain([(train, test)], ItemPreferences(), "votes")
    assert found.verdict == "something"
    assert found.by_user.gain > 0.05
    assert found.chosen[0].rank in (2, 4)


def test_tastes_that_are_not_there_are_not_found():
    train, test = simulated(taste=0.0)
    found = personalization_gain([(train, test)], ItemPreferences(), "votes")
    assert found.verdict == "next to nothing"
    assert found.by_user.low <= 0 <= found.by_user.high
    assert abs(found.by_user.gain) < SMALL


def test_no_votes_to_compare_on_are_no_comparison():
    train, _ = simulated(taste=0.0, users=3, per_user=3)
    assert personalization_gain([(train, train[np.array([], dtype=np.int64)])], ItemPreferences(), "votes") is None


def test_few_votes_cannot_tell():
    train, test = simulated(taste=0.0, users=10, per_user=10)
    assert personalization_gain([(train, test)], ItemPreferences(), "votes").verdict == "cannot tell"


@pytest.mark.parametrize(("taste", "verdict"), [(1.0, "something"), (0.0, "next to nothing")])
def test_slopes_tell_tastes_for_features_from_none(taste, verdict):
    draw = np.random.default_rng(0)
    features = draw.normal(size=(12_000, 3))
    users, pairs = np.arange(6000) % 150, np.arange(12_000).reshape(2, -1)
    weights = draw.normal(size=3) + taste * draw.normal(size=(150, 3))
    difference = ((features[pairs[0]] - features[pairs[1]]) * weights[users]).sum(1)
    wins = draw.random(6000) < 1 / (1 + np.exp(-difference))
    votes = Votes(users, *np.where(wins, pairs, pairs[::-1]), 150, 12_000)
    half = np.arange(6000) < 3000
    assert (
        personalization_gain(
            [(votes[half], votes[~half])], FeaturePreferences(torch.from_numpy(features)), "votes"
        ).verdict
        == verdict
    )


def test_folds_hold_out_what_their_scheme_says():
    votes, _ = simulated(0.0, users=20, items=10)

    def cells(part):
        return {*zip(part.users, part.winners, strict=True), *zip(part.users, part.losers, strict=True)}

    for train, test in folds(votes, "items", 0):
        assert test.any()
        assert not cells(votes[train]) & cells(votes[test])
    for train, test in folds(votes, "pairs", 0):
        assert not np.isin(votes[test].pairs, votes[train].pairs).any()
    held = np.sum([test for _, test in folds(votes, "votes", 0)], axis=0)
    assert (held == 1).all()


def test_votes_are_held_out_as_a_validation_split_was():
    votes, _ = simulated(0.0, users=20, items=10, per_user=30)
    train, test = next(folds(votes, "items", 0))
    assert scheme_for(votes[train], votes[test]) == "items"
    assert scheme_for(votes, votes) == "votes"
    train, test = next(folds(votes, "pairs", 0))
    assert scheme_for(votes[train], votes[test]) == "pairs"
    once = Votes(np.arange(50) % 5, np.arange(50), np.arange(50, 100), 5, 100)
    assert scheme_for(once, None) == "votes"
    assert known_from_others(once, once) == 0
    assert known_from_others(votes, votes) == 1


def test_the_bootstrap_draws_users_not_votes():
    draw = np.random.default_rng(0)
    sums, counts = 10 * draw.normal(size=400), np.full(400, 10.0)
    low, high = bootstrap(sums, counts)
    assert (high - low) / 2 == pytest.approx(1.96 * sums.std() / 10 / 20, rel=0.1)
    assert mean_over_users(np.array([1.0, 0.0, 0.0]), np.array([3, 3, 5])) == 0.25
