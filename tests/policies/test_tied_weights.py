"""Adapters of an LM head that shares its weight with the embeddings, or of the embeddings, change that layer alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.types import Tokens

IDS = [1, 5, 6, 7, 8, 2]
EMBEDDINGS = {"qwen": "embed_tokens", "gpt2": "wte"}


def plain_scores(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([IDS])).logits[0, 2:5].log_softmax(-1).gather(-1, torch.tensor(IDS[3:])[:, None])[:, 0]


def scores(policy: CausalLMPolicy) -> torch.Tensor:
    (found,) = policy.log_probs(Tokens.from_lists([IDS[:3]]), [Tokens.from_lists([IDS[3:]])])
    return found.tokens[0].detach()


@pytest.mark.parametrize("target", ["head", "embeddings", "both", "regex"])
@pytest.mark.parametrize("name", ["qwen", "gpt2"])
def test_what_was_trained_is_what_is_exported(model_paths, tmp_path, name, target):
    words = EMBEDDINGS[name]
    layers = {"head": ["lm_head"], "embeddings": [words], "both": ["lm_head", words], "regex": ".*lm_head"}[target]
    policy = CausalLMPolicy(model_paths[name], lora=LoRA(rank=4, target_modules=layers))
    policy.build()
    for param in policy.parameters():
        if param.requires_grad:
            torch.nn.init.normal_(param, std=0.2)
    trained = scores(policy)
    torch.testing.assert_close(trained, plain_scores(policy.lm), rtol=1e-4, atol=1e-5)  # as peft computes
    assert (trained - plain_scores(AutoModelForCausalLM.from_pretrained(model_paths[name]))).abs().max() > 0.1
    policy.merged().save_pretrained(tmp_path / "merged")
    policy.model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    base = AutoModelForCausalLM.from_pretrained(model_paths[name])
    for exported in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base, tmp_path / "adapters"),
    ):
        torch.testing.assert_close(plain_scores(exported), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(policy.merged_for_scoring()), trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores(policy), trained)  # the policy itself is left as it was


def test_a_tied_model_stays_tied_where_its_head_has_no_adapter(model_paths, tmp_path):
    policy = CausalLMPolicy(model_paths["qwen"], lora=LoRA(rank=2))
    policy.build()
    policy.merged().save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight is exported.get_input_embeddings().weight
