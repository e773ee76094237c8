"""Running statistics of users' rewards, against exact ones in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning import losses as L
from prlhf_lightning.errors import ConfigurationError

PLAIN = {"window": 1e9, "prior_count": 0.0}  # no forgetting, no shrinkage


def batch(users, prompts=3, n=4, spread=None, seed=0):
    """Rewards, groups and users of n completions for each of `prompts` prompts of each user."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.as_tensor(users)
    spread = torch.ones(len(users)) if spread is None else torch.as_tensor(spread)
    rewards = torch.randn(len(users), prompts, 1, generator=generator) + spread[:, None, None] * torch.randn(
        len(users), prompts, n, generator=generator
    )
    groups = torch.arange(len(users) * prompts).repeat_interleave(n)
    return rewards.flatten(), groups, users.repeat_interleave(prompts * n)


def test_the_scale_is_the_pooled_deviation_within_groups():
    scale = L.UserScale(**PLAIN)
    parts = [batch([1, 2], seed=seed) for seed in range(3)]
    for part in parts:
        scale.update(*part)
    for user in (1, 2):
        within = np.concatenate([r[u == user].reshape(-1, 4).numpy() for r, _, u in parts])
        expected = np.sqrt(within.var(axis=1, ddof=1).mean())
        assert scale.std(torch.tensor([user])).item() == pytest.approx(expected, rel=1e-5)


def test_with_the_users_own_baseline_it_is_that_of_all_rewards():
    scale = L.UserScale(**PLAIN, baseline="user")
    parts = [batch([1, 2], seed=seed) for seed in range(3)]
    for part in parts:
        found = scale(*part)
    for user in (1, 2):
        all_rewards = np.concatenate([r[u == user].numpy() for r, _, u in parts])
        rewards, _, users = parts[-1]
        expected = (rewards[users == user].numpy() - all_rewards.mean()) / (all_rewards.std(ddof=1) + 1e-4)
        assert found[users == user].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_users_whose_rewards_vary_more_get_no_larger_advantages():
    scale = L.UserScale()
    for seed in range(20):
        rewards, groups, users = batch([1, 2], spread=[0.1, 10.0], seed=seed)
        found = scale(rewards, groups, users)
    sizes = [found[users == user].std().item() for user in (1, 2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([1.0, 16.0]),
)
def test_advantages_are_limited_by_window_and_prior(groups, prior):
    scale = L.UserScale(window=20.0, prior_count=prior)
    for rewards in groups:
        found = scale(torch.tensor(rewards), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long))
        assert found.isfinite().all()
        assert found.abs().max() <= (20 + 4 + prior) ** 0.5


def test_a_user_who_was_never_seen_has_the_pooled_scale():
    scale = L.UserScale(prior_count=5.0)
    scale.update(*batch([1, 2], spread=[1.0, 3.0]))
    own = L.UserScale(prior_count=0.0)
    own.load_state_dict(scale.state_dict())
    first, second = own.std(torch.tensor([1, 2])).tolist()  # both from the same number of completions
    assert scale.std(torch.tensor([0, 7])).tolist() == pytest.approx([(first * second) ** 0.5] * 2)


def test_shrinkage_is_that_of_prior_observations():
    scale = L.UserScale(window=1e9, prior_count=5.0)
    scale.update(*batch([1, 2], spread=[1.0, 1.5]))
    pooled = scale.std(torch.tensor([0])).item()
    own = (scale.squares[2] / 9).sqrt().item()  # three groups of four
    assert scale.std(torch.tensor([2])).item() == pytest.approx(own ** (9 / 14) * pooled ** (5 / 14))


def test_the_order_of_rows_and_unscored_rows_change_nothing():
    rewards, groups, users = batch([1, 2, 3])
    straight, shuffled = L.UserScale(), L.UserScale()
    straight.update(rewards, groups, users)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    extra = torch.tensor([float("nan")])
    shuffled.update(
        torch.cat([rewards[order], extra]), torch.cat([groups[order], groups[:1]]), torch.cat([users[order], users[:1]])
    )
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(shuffled.state_dict()[name], value)


def test_the_state_continues_a_run_exactly():
    first, fresh = L.UserScale(), L.UserScale()
    first.update(*batch([1, 5]))
    fresh.load_state_dict(first.state_dict())
    later = batch([2, 9], seed=1)
    assert torch.equal(fresh(*later), first(*later))
    assert len(fresh.counts) == 10


def test_evaluation_changes_no_statistics():
    scale = L.UserScale()
    scale.update(*batch([1, 2]))
    before = {name: value.clone() for name, value in scale.state_dict().items()}
    scale.eval()(*batch([1, 2, 3], seed=1))
    assert all(torch.equal(value, before[name]) for name, value in scale.state_dict().items())


def test_statistics_stay_in_float32_under_a_cast():
    scale = L.UserScale()
    scale.update(*batch([1]))
    assert scale.to(torch.bfloat16).squares.dtype == torch.float32


def test_impossible_settings_are_refused():
    for settings in ({"window": 0.0}, {"prior_count": -1.0}, {"baseline": "prompt"}):
        with pytest.raises(ConfigurationError, match=f"UserScale: {next(iter(settings))}"):
            L.UserScale(**settings)


def test_the_worst_served_user_has_the_largest_weight():
    weights = L.worst_served_weights(torch.tensor([1.0, 0.0, 1.0]), strength=1.0)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights[1] / weights[0] == pytest.approx(np.e)
    assert L.worst_served_weights(torch.randn(4), strength=0.0).tolist() == pytest.approx([1.0] * 4)
