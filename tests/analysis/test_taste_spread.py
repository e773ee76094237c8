"""How far users' weights of features lie apart, against users whose weights are known."""

from __future__ import annotations

import numpy as np
import pytest

from prlhf_lightning.analysis.differences import preference_spread

SPREAD, MEAN = np.array([1.0, 0.4, 0.0]), np.array([0.5, 0.0, -0.3])


def votes(users, each, seed=0):
    """Votes of users whose weights are drawn, on pairs whose second feature goes with the first."""
    draw = np.random.default_rng(seed)
    weights = MEAN + SPREAD * draw.normal(size=(users, 3))
    who = draw.permutation(np.repeat(np.arange(users), each))
    differences = draw.normal(size=(len(who), 3))
    differences[:, 1] = 0.6 * differences[:, 0] + 0.8 * differences[:, 1]
    chosen = draw.random(len(who)) < 1 / (1 + np.exp(-(differences * weights[who]).sum(1)))
    return who, np.where(chosen[:, None], differences, -differences), weights


@pytest.mark.parametrize(("users", "each"), [(150, 40), (400, 8)])
def test_spread_and_mean_are_those_that_users_were_drawn_with(users, each):
    who, differences, weights = votes(users, each)
    found = preference_spread(who, differences, users)
    assert found.spread == pytest.approx(SPREAD, abs=0.2)
    assert found.mean == pytest.approx(MEAN, abs=0.2)
    assert (found.low <= SPREAD + 0.05).all()
    assert (found.high >= SPREAD - 0.05).all()
    assert found.low[0] > 0.5
    assert found.low[2] == 0
    assert np.corrcoef(found.weights[:, 0], weights[:, 0])[0, 1] > 0.6


def test_single_users_and_users_without_votes_are_average():
    who, differences, _ = votes(1, 60)
    found = preference_spread(who + 1, differences, 3)
    assert (found.low == 0).all()
    assert (found.weights[0] == found.mean).all()
    assert np.isfinite(found.weights).all()


def test_nobody_is_told_apart_by_a_vote_each():
    who, differences, _ = votes(60, 1)
    found = preference_spread(who, differences, 60)
    assert np.isfinite(found.high).all()
    assert found.low[1:].tolist() == [0, 0]
