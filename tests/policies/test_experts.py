"""Mixtures of experts train with their load-balancing loss, as transformers computes it, or say that they do not."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.types import Tokens

SMALL = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "router_aux_loss_coef": 0.25}
CONFIGS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "granite": GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, logits_scaling=2.0),
}
PROMPTS, ANSWERS = [[1, 5, 6], [1, 7, 8, 9, 10]], ([[4, 20, 2], [11, 2]], [[12, 2], [13, 14, 15, 2]])
ROWS = [[*prompt, *answer] for answers in ANSWERS for prompt, answer in zip(PROMPTS, answers, strict=True)]


def saved(config: PretrainedConfig, folder, wanted: bool = True) -> str:
    torch.manual_seed(0)
    config.output_router_logits = wanted
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def score(policy: CausalLMPolicy) -> torch.Tensor | None:
    chosen, rejected = policy.log_probs(Tokens.from_lists(PROMPTS), [Tokens.from_lists(part) for part in ANSWERS])
    loss = policy.auxiliary_loss()
    assert policy.auxiliary_loss() is None  # once
    plain = Tokens.from_lists(ROWS)
    with torch.no_grad():
        logits = policy.lm(input_ids=plain.ids, attention_mask=plain.mask.long(), output_router_logits=False).logits
    scores = torch.cat([part.tokens[part.mask] for part in (chosen, rejected)])
    places = [
        (row, len(PROMPTS[row % 2]) + i) for row in range(4) for i in range(len(ROWS[row]) - len(PROMPTS[row % 2]))
    ]
    expected = torch.stack([logits[row, at - 1].log_softmax(-1)[ROWS[row][at]] for row, at in places])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    return loss


@pytest.mark.parametrize("lora", [LoRA(rank=2, target_modules=["q_proj"]), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_load_balancing_loss_is_that_of_transformers(tmp_path, name, lora):
    path = saved(CONFIGS[name], tmp_path)
    policy = CausalLMPolicy(path, lora=lora)
    policy.build()
    plain, rows = AutoModelForCausalLM.from_pretrained(path), Tokens.from_lists(ROWS)
    output = plain(input_ids=rows.ids, attention_mask=rows.mask.long())
    expected = 0.25 * load_balancing_loss_func(output.router_logits, 4, 2, rows.mask.long())
    loss = score(policy)
    torch.testing.assert_close(loss, expected)
    if lora is None:
        for total in (loss, expected):
            total.backward()
        ours, theirs = (lm.get_input_embeddings().weight.grad for lm in (policy.lm, plain))
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_setting_wins_and_adds_a_loss_only_in_training(tmp_path):
    path = saved(CONFIGS["mixtral"], tmp_path)
    losses = []
    for setting in (None, 0.5, 0):
        policy = CausalLMPolicy(path, router_aux_loss_coef=setting)
        policy.build()
        losses.append(score(policy))
        assert list(policy.training_notes()) == []
        policy.eval()
        assert score(policy) is None
    torch.testing.assert_close(losses[1], 2 * losses[0])
    assert losses[2] is None


def test_training_a_mixture_without_balancing_names_the_setting(tmp_path):
    policy = CausalLMPolicy(saved(CONFIGS["mixtral"], tmp_path, wanted=False))
    policy.build()
    assert score(policy) is None
    (note,) = policy.training_notes()
    assert "It trains without this loss; model.policy.router_aux_loss_coef=0.25 adds it" in note


def test_a_model_without_experts_has_none(model_path, tmp_path):
    policy = CausalLMPolicy(model_path)
    policy.build()
    assert list(policy.training_notes()) == []
    with pytest.raises(ConfigurationError, match=r"router_aux_loss_coef is 0.1, but LlamaForCausalLM has no"):
        CausalLMPolicy(model_path, router_aux_loss_coef=0.1).build()
    with pytest.raises(ConfigurationError, match=r"router_aux_loss_coef is -1"):
        CausalLMPolicy(model_path, router_aux_loss_coef=-1)
