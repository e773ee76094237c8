"""Any number of completions of each prompt, scored at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Policy
from prlhf_lightning.policies.scoring import Capabilities
from prlhf_lightning.types import SoftPrompt, Tokens


def build(path: str, lora: LoRA | None) -> CausalLMPolicy:
    policy = CausalLMPolicy(path, lora=lora)
    policy.build()
    for name, param in policy.named_parameters():
        if "lora_B" in name:  # adapters that do something
            torch.nn.init.normal_(param, std=0.2)
    return policy.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_completion_is_scored_as_alone_with_its_prompt(model_paths, name, data):
    policy = build(model_paths[name], data.draw(st.sampled_from([None, LoRA(rank=4)])))
    if data.draw(st.booleans()):
        policy.shortcuts = Capabilities(head=True, shared_prompt=False)
    token, prompts = st.integers(4, 20), data.draw(st.integers(1, 3))
    prompt = Tokens.from_lists([[1, *data.draw(st.lists(token, max_size=5))] for _ in range(prompts)])
    texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=7))
    prompt_of = torch.tensor([data.draw(st.integers(0, prompts - 1)) for _ in texts])
    soft_prompt = data.draw(st.sampled_from([None, SoftPrompt.full(torch.randn(prompts, 2, 32))]))
    reference, completions = data.draw(st.booleans()), Tokens.from_lists(texts)
    scorer = policy if reference else policy.merged_for_scoring()
    found = scorer.grouped_log_probs(prompt, completions, prompt_of, soft_prompt, reference, batch_size=3)
    # What a policy does that brings no way of its own.
    expected = Policy.grouped_log_probs(policy, prompt, completions, prompt_of, soft_prompt, reference, batch_size=1)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-5, atol=2e-5)
    assert torch.equal(found.mask, completions.mask)


def test_only_weighing_adapters_merge_and_large_ones_never(model_path, monkeypatch):
    policy = build(model_path, LoRA(rank=4))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    assert not any("lora" in name for name, _ in policy.merged_for_scoring().named_parameters())
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())
    for kept in (build(model_path, None), build(model_path, LoRA(rank=4)).bfloat16()):
        assert kept.merged_for_scoring() is kept
    monkeypatch.setattr("prlhf_lightning.policies.causal_lm._MAX_MERGED_PARAMETERS", 1000)
    assert policy.merged_for_scoring() is policy


def test_too_long_a_completion_names_the_settings(model_path):
    policy = build(model_path, None)
    limit = policy.max_positions
    short, long = Tokens.from_lists([[1, 5]]), Tokens.from_lists([[6], [7] * limit])
    with pytest.raises(ConfigurationError, match=f"A sequence of {limit + 2} positions"):
        policy.grouped_log_probs(short, long, torch.tensor([0, 0]))
