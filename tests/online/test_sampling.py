"""Answers are samples of the policy that is trained, under each prompt's own soft prompt."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.online import Sampler
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.types import SoftPrompt, Tokens

PROMPTS = Tokens.from_lists([[1, 5, 6, 7], [1, 8], [1, 9, 10]])
EOS = 2


@pytest.fixture(params=["llama", "gpt2"])
def policy(request, model_paths) -> CausalLMPolicy:
    """A policy whose adapters are not zero."""
    made = CausalLMPolicy(model_paths[request.param], lora=LoRA(rank=2))
    made.build()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return made


@pytest.fixture
def soft_prompt() -> SoftPrompt:
    return SoftPrompt.full(torch.randn(3, 2, 32))


def test_log_probs_are_those_of_the_trainer(policy, soft_prompt):
    sampling = Sampling(max_new_tokens=8, temperature=0.7)
    answers = Sampler(policy, rows=4).sample(PROMPTS, soft_prompt, sampling, [[3 * p, 3 * p + 1] for p in range(3)])
    every = torch.arange(3).repeat_interleave(2)
    (scored,) = policy.log_probs(PROMPTS.select(every), [answers.tokens], soft_prompt.select(every), 0.7)
    torch.testing.assert_close(answers.log_probs, scored.tokens, atol=2e-5, rtol=0)
    (others,) = policy.log_probs(PROMPTS.select(every), [answers.tokens], soft_prompt.select(every))
    assert (answers.log_probs - others.tokens).abs().max() > 0.01  # the temperature is in them


def test_an_answer_depends_on_its_seed_alone(policy, soft_prompt):
    sampling = Sampling(max_new_tokens=8)
    sampler = Sampler(policy)
    together = sampler.sample(PROMPTS, soft_prompt, sampling, [[1, 2], [3, 4], [5, 6]])
    one = torch.tensor([1])
    alone = sampler.sample(PROMPTS.select(one).trimmed(), soft_prompt.select(one), sampling, [[9, 4, 3]])
    ids = [row.tolist() for row in together.tokens.unpadded()]
    assert [row.tolist() for row in alone.tokens.unpadded()][1:] == [ids[3], ids[2]]


def test_tokens_are_drawn_from_the_policy_under_the_user(policy, soft_prompt):
    sampling, count = Sampling(max_new_tokens=1, temperature=1.5), 4000
    answers = Sampler(policy, rows=count).sample(PROMPTS, soft_prompt, sampling, [range(count)] * 3)
    for number in range(3):
        row = torch.tensor([number])
        targets = Tokens(torch.arange(VOCAB)[:, None], torch.ones(VOCAB, 1, dtype=torch.bool))
        (exact,) = policy.log_probs(
            PROMPTS.select(row.expand(VOCAB)), [targets], soft_prompt.select(row.expand(VOCAB)), 1.5
        )
        drawn = answers.tokens.ids[number * count : (number + 1) * count, 0]
        frequencies = torch.bincount(drawn, minlength=VOCAB) / count
        assert 0.5 * (frequencies - exact.tokens[:, 0].exp()).abs().sum() < 0.05  # total variation


def test_an_answer_ends_with_its_end_token_or_is_truncated(policy, soft_prompt):
    answers = Sampler(policy).sample(PROMPTS, soft_prompt, Sampling(max_new_tokens=12), [list(range(40))] * 3)
    rows = [row.tolist() for row in answers.tokens.unpadded()]
    assert {True, False} == set(answers.truncated.tolist())
    for row, truncated in zip(rows, answers.truncated.tolist(), strict=True):
        assert EOS not in row[:-1]
        assert truncated == (row[-1] != EOS)
        assert len(row) == 12 or not truncated
    assert (answers.log_probs[~answers.tokens.mask] == 0).all()


def test_greedy_answers_are_those_of_generate(policy, soft_prompt):
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    answers = Sampler(policy).sample(PROMPTS, soft_prompt, greedy, [[0]] * 3)
    written = policy.generate(PROMPTS, soft_prompt, greedy)
    assert [row.tolist() for row in answers.tokens.unpadded()] == [row.tolist() for row in written.unpadded()]


def test_truncated_distributions_are_refused(policy, soft_prompt):
    with pytest.raises(ConfigurationError, match="top_p"):
        Sampler(policy).sample(PROMPTS, soft_prompt, Sampling(top_p=0.9), [[0]] * 3)
