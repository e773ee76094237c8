"""The reward policy: which token its reward is read at, and that how it is computed changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import LoRA, RewardPolicy, Sampling
from prlhf_lightning.policies.scoring import Capabilities
from prlhf_lightning.types import SoftPrompt, Tokens

EOS = 2
# Completions that end without, with one and with two end tokens; the second prompt repeats its own end token.
PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11], [1, 12, EOS, 13, EOS, 14], [1, 15]]
CHOSEN = [[16, 17, EOS], [18, EOS, EOS], [19, 20, 21, 22]]
REJECTED = [[23, EOS], [4, 5, 6, 7, EOS], [EOS]]
WIDTH = 32


def build(path, lora=LoRA(rank=4), **settings) -> RewardPolicy:  # noqa: B008
    policy = RewardPolicy(path, lora=lora, **settings)
    policy.build(with_reference=False)
    torch.nn.init.normal_(policy.head.weight)
    for name, param in policy.named_parameters():
        if "lora_B" in name:  # adapters that do something
            torch.nn.init.normal_(param, std=0.2)
    return policy


def batch(padding=EOS):
    """The texts, padded with the end token, and soft prompts of unequal length."""
    vectors = torch.randn(len(PROMPTS), 3, WIDTH)
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    texts = [Tokens.from_lists(rows, padding) for rows in (PROMPTS, CHOSEN, REJECTED)]
    return texts[0], texts[1:], SoftPrompt(vectors, mask)


def by_hand(policy: RewardPolicy, soft_prompt: SoftPrompt) -> torch.Tensor:
    """The rewards `[2, B]`, one unpadded row at a time, by the own layers of a model in float64."""
    lm, head = policy.lm, policy.head.weight[0]
    words = lm.get_input_embeddings()
    found = []
    for completions in (CHOSEN, REJECTED):
        for vectors, prompt, completion in zip(soft_prompt.unpadded(), PROMPTS, completions, strict=True):
            parts = [words(torch.tensor(prompt[:1])), vectors.double(), words(torch.tensor(prompt[1:] + completion))]
            states = lm(inputs_embeds=torch.cat(parts)[None], use_cache=False, output_hidden_states=True).hidden_states
            found.append(states[-1][0, -1] @ head)
    return torch.stack(found).view(2, -1)


SHORTCUTS = {
    "padded rows": Capabilities(head=True, shared_prompt=False),
    "cached prompt": Capabilities(head=True, shared_prompt=True),
    "trees": Capabilities(head=True, shared_prompt=False, trees=True),
    "logits that are more than a product": Capabilities(head=False, shared_prompt=False),
}


@pytest.mark.parametrize("way", SHORTCUTS)
@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
def test_the_reward_is_read_at_the_last_real_token(model_paths, name, way):
    policy = build(model_paths[name])
    policy.shortcuts = SHORTCUTS[way]
    prompt, completions, soft_prompt = batch()
    rewards = policy.log_probs(prompt, completions, soft_prompt)
    expected = by_hand(copy.deepcopy(policy).double(), soft_prompt)
    for part, completion, own in zip(rewards, completions, expected, strict=True):
        torch.testing.assert_close(part.sum.double(), own, rtol=1e-4, atol=1e-4)
        assert torch.equal(part.tokens.bool().sum(1), torch.ones(3, dtype=torch.long))
        assert not part.tokens[~completion.mask].any()


@pytest.mark.parametrize("shared", [True, False])
def test_texts_that_share_their_prompt_get_the_same_rewards(model_path, shared):
    policy = build(model_path)
    policy.shortcuts = replace(policy.shortcuts, shared_prompt=shared)
    prompt, completions, soft_prompt = batch()
    both = Tokens.concat(completions)
    order = torch.tensor([4, 0, 5, 2, 1, 3])  # in the order of neither prompts nor lengths
    with torch.no_grad():
        found = policy.grouped_log_probs(prompt, both.select(order), order % 3, soft_prompt, batch_size=2)
        expected = torch.cat([part.sum for part in policy.log_probs(prompt, completions, soft_prompt)])
    torch.testing.assert_close(found.sum, expected[order], rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_float64(model_path):
    policy = build(model_path)
    prompt, completions, soft_prompt = batch()
    exact = copy.deepcopy(policy).double()

    def gradients(of: RewardPolicy, rewards: torch.Tensor) -> Sequence[torch.Tensor]:
        loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).sum()
        return torch.autograd.grad(loss, [param for param in of.parameters() if param.requires_grad])

    rewards = [part.sum for part in policy.log_probs(prompt, completions, soft_prompt)]
    found = gradients(policy, torch.stack(rewards))
    expected = gradients(exact, by_hand(exact, soft_prompt))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-4)
    assert all(part.abs().max() > 0 for part in found)  # the head's, and those of all adapters


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_in_full_training_only_an_untied_lm_head_stays_as_it_is(model_paths, name):
    policy = build(model_paths[name], lora=None)
    frozen = {name for name, param in policy.named_parameters() if not param.requires_grad}
    assert frozen == (set() if name == "qwen" else {"model.lm_head.weight"})
    assert policy.reference_model is None


def test_rewards_start_near_zero(model_path):
    policy = RewardPolicy(model_path)
    policy.build(with_reference=False)
    prompt, completions, _ = batch()
    assert all(part.sum.abs().max() < 0.5 for part in policy.log_probs(prompt, completions))


def test_merged_adapters_keep_the_head(model_path):
    policy = build(model_path)
    merged = policy.merged_for_scoring()
    assert merged is not policy
    prompt, completions, soft_prompt = batch()
    for ours, theirs in zip(
        *(one.log_probs(prompt, completions, soft_prompt) for one in (policy, merged)), strict=True
    ):
        torch.testing.assert_close(ours.sum, theirs.sum, rtol=1e-3, atol=1e-3)


def test_it_writes_nothing_and_has_no_reference(model_path):
    policy = build(model_path)
    prompt, completions, soft_prompt = batch()
    with pytest.raises(ConfigurationError, match="a reward model: it writes no text"):
        policy.generate(prompt, soft_prompt, Sampling())
    with pytest.raises(ConfigurationError, match="has no reference"):
        policy.reference_log_probs(prompt, completions)
