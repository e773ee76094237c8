"""Reward functions are called as TRL calls them, and fail for single answers."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.online.rewards import Reward, RewardSum

ANSWERS = {
    "prompts": ["p", "p", "q", "q"],
    "completions": ["a", "bb", "ccc", "dddd"],
    "completion_ids": [[5], [6, 6], [7], [8]],
    "user_id": ["ann", "ann", "bob", "bob"],
    "target": [1, 2, 3, 5],
}


def equals_target(completions, target, **kwargs):  # the form of TRL's documentation
    return [1.0 if len(text) == wanted else 0.0 for text, wanted in zip(completions, target, strict=True)]


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def test_a_function_of_trl_runs_unchanged():
    assert RewardSum([Reward(equals_target)])(ANSWERS).total.tolist() == [1, 1, 1, 0]
    assert RewardSum([Reward(length)])(ANSWERS).total.tolist() == [1, 2, 3, 4]
    rewards = pytest.importorskip("trl.rewards")
    shaped = rewards.get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2)
    own = shaped(completion_ids=ANSWERS["completion_ids"])
    assert RewardSum([Reward(shaped)])(ANSWERS).total.tolist() == own


def test_async_functions_run_together():
    met = asyncio.Event()

    async def first(completions, **kwargs):
        await asyncio.wait_for(met.wait(), 30)  # until the second function runs
        return [len(text) for text in completions]

    async def second(completions, **kwargs):
        met.set()
        return [None] * len(completions)

    assert RewardSum([Reward(first), Reward(second)])(ANSWERS).total.tolist() == [1, 2, 3, 4]


def test_none_leaves_a_reward_out_of_the_sum():
    def some(completions, **kwargs):
        return [None, 10, None, 10]

    scores = RewardSum([Reward(some, weight=0.5), Reward(length)])(ANSWERS)
    assert scores.total.tolist() == [1, 7, 3, 9]
    assert not scores.failures
    assert RewardSum([Reward(some)])(ANSWERS).total.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "ValueError"])
def test_a_reward_that_fails_costs_one_answer(bad):
    def fails(completions, **kwargs):
        if bad == "ValueError" and "bb" in completions:
            raise ValueError("odd answer")
        return [bad if text == "bb" else 1.0 for text in completions]

    scores = RewardSum([Reward(fails), Reward(length)])(ANSWERS)
    assert scores.total.nan_to_num(-1).tolist() == [2, -1, 4, 5]
    (failure,) = scores.failures
    assert (failure.answer, failure.reward) == (1, "fails")
    assert ("odd answer" if bad == "ValueError" else str(bad)) in failure.reason


def test_a_reward_that_always_fails_stops_the_run():
    def wrong(completions, columns_that_do_not_exist):
        return [0.0 for _ in completions]

    with pytest.raises(ConfigurationError, match=r"wrong fails for all 4.*columns_that_do_not_exist"):
        RewardSum([Reward(wrong)])(ANSWERS)


@pytest.mark.parametrize("bad", ["good", torch.ones(2)])
def test_a_reward_that_is_never_a_number_stops_the_run(bad):
    with pytest.raises(ConfigurationError, match="gives no number for any of the 4 answers"):
        RewardSum([Reward(lambda completions: [bad] * len(completions), name="bad")])(ANSWERS)


@pytest.mark.parametrize("output", [1.0, None, torch.tensor(1.0), "1234", dict.fromkeys(range(4), 0.5)])
def test_a_reward_that_returns_no_list_is_refused(output):
    with pytest.raises(ConfigurationError, match="bad returned a value of type"):
        RewardSum([Reward(lambda completions: output, name="bad")])(ANSWERS)


def test_another_number_of_rewards_is_refused():
    with pytest.raises(ConfigurationError, match="returned 1 values for 4"):
        RewardSum([Reward(lambda completions: [0.0])])(ANSWERS)


def test_normalized_rewards_have_equal_weight_within_a_row():
    large = Reward(lambda completions: [1000 * len(text) for text in completions], normalize=True, name="large")
    total = RewardSum([large])(ANSWERS, copies=2).total
    torch.testing.assert_close(total, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / 2**0.5, atol=1e-4, rtol=0)


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigurationError, match="length stands there twice"):
        RewardSum([Reward(length), Reward(length)])
