"""What is said about sampled answers."""

import math

import torch

from prlhf_lightning.cli.candidates import described


def test_rewards_and_lengths_are_summarized():
    rewards = [torch.tensor([1.0, 3.0, math.nan]), torch.tensor([5.0, 4.0, 3.0])]
    lengths = [torch.tensor([2, 4, 9]), torch.tensor([1, 1, 1])]
    said = described(rewards, lengths)
    assert said.startswith("Mean reward of an answer: 3.000; of the best of 3: 4.000, at most 0.43 nats")
    assert "Tokens: 3.0, of the best 2.5; correlation of reward and length 0.71." in said
    assert said.endswith("Answers without a reward: 1 (blank, or refused by the scorer).")


def test_equal_lengths_have_no_correlation():
    assert "correlation" not in described([torch.tensor([1.0, 2.0])], [torch.tensor([3, 3])])
    assert described([torch.tensor([math.nan])], [torch.tensor([0])]).startswith("No answer has a reward.")
