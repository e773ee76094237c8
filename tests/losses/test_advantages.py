"""Advantages within groups, against loops in numpy, and the faults that other implementations had."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning import losses as L

FUNCTIONS = {
    "centered": L.centered_advantages,
    "group": L.group_scaled_advantages,
    "batch": L.batch_scaled_advantages,
    "leave_one_out": L.leave_one_out_advantages,
}
every_kind = pytest.mark.parametrize("kind", FUNCTIONS)


def by_hand(kind, rewards, groups):
    """The advantages, completion by completion, in float64."""
    rewards = np.asarray(rewards, dtype=np.float64)
    found = np.zeros(len(rewards))
    for i, reward in enumerate(rewards):
        group = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i] and not math.isnan(r)]
        if math.isnan(reward) or len(group) < 2:
            continue
        found[i] = reward - np.mean(group)
        if kind == "group":
            found[i] /= np.std(group, ddof=1) + 1e-4
        elif kind == "batch":
            found[i] /= np.nanstd(rewards, ddof=1) + 1e-4
        elif kind == "leave_one_out":
            found[i] = reward - (sum(group) - reward) / (len(group) - 1)
    return found


@every_kind
def test_groups_of_any_size_and_order_follow_the_equations(kind):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 7, (30,), generator=generator) * 11  # ids need not be consecutive
    rewards = torch.randn(30, generator=generator, dtype=torch.float64)
    rewards[::5] = math.nan
    assert FUNCTIONS[kind](rewards, groups).numpy() == pytest.approx(by_hand(kind, rewards, groups.tolist()))


@every_kind
@given(reward=st.floats(-1e6, 1e6, width=32), n=st.integers(1, 17))
def test_a_group_of_equal_rewards_gets_exactly_zero(kind, reward, n):
    rewards = torch.full((n + 2,), reward)
    rewards[-2:] = torch.tensor([0.0, 1.0])  # another group, so that the batch varies
    groups = torch.tensor([0] * n + [1, 1])
    assert not FUNCTIONS[kind](rewards, groups)[:n].any()


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=12))
def test_no_advantage_is_larger_than_its_group_allows(rewards):
    n = len(rewards)
    found = L.group_scaled_advantages(torch.tensor(rewards), torch.zeros(n, dtype=torch.long))
    assert found.abs().max() <= (n - 1) / math.sqrt(n) + 1e-5
    assert abs(found.sum().item()) < 1e-3


@every_kind
@pytest.mark.parametrize("others", [0.35, 0.1, 0.0])
def test_one_that_differs_from_equal_others_is_not_blown_up(kind, others):
    # The standard deviation of the seven others is 0, but 1e-4 after rounding: dividing by it gives thousands.
    rewards = torch.tensor([others] * 7 + [0.95])
    assert FUNCTIONS[kind](rewards, torch.zeros(8, dtype=torch.long)).abs().max() < 3


@every_kind
def test_rounding_errors_of_equal_rewards_are_no_signal(kind):
    rewards = 1000.1 * (1 + 1e-7 * torch.tensor([0.0, 1.0, -1.0, 2.0]))
    assert rewards.unique().numel() > 1
    assert not FUNCTIONS[kind](rewards, torch.zeros(4, dtype=torch.long)).any()


def test_batch_scaling_keeps_the_sizes_of_groups_apart():
    groups = torch.tensor([0, 0, 1, 1])
    found = L.batch_scaled_advantages(torch.tensor([0.0, 1.0, 0.0, 10.0]), groups)
    assert (found[3] / found[1]).item() == pytest.approx(10)
    each = L.group_scaled_advantages(torch.tensor([0.0, 1.0, 0.0, 10.0]), groups)
    assert (each[3] / each[1]).item() == pytest.approx(1, abs=1e-3)


@every_kind
def test_a_completion_without_a_score_costs_itself_alone(kind):
    rewards, groups = torch.tensor([1.0, math.nan, 3.0]), torch.zeros(3, dtype=torch.long)
    found = FUNCTIONS[kind](rewards, groups)
    assert found[1] == 0
    assert torch.equal(found[[0, 2]], FUNCTIONS[kind](rewards[[0, 2]], groups[:2]))
    assert not FUNCTIONS[kind](torch.full((3,), math.nan), groups).any()
