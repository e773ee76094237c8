"""What can't be done with weights in 4 or 8 bits is told in one line, and the rest is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, causal_lm
from prlhf_lightning.types import Tokens


@pytest.fixture
def quantized(model_path, monkeypatch):
    """Let models be loaded as quantized ones, whose weights are as they were."""

    def load(path: str, **options: object):
        lm = AutoModelForCausalLM.from_pretrained(path)
        lm.is_quantized = True
        config = SimpleNamespace(quant_method="fbgemm_fp8")
        lm.hf_quantizer = SimpleNamespace(is_trainable=trainable[0], quantization_config=config)
        return lm

    trainable = [True]
    monkeypatch.setattr(causal_lm, "load_lm", load)
    return trainable


def test_its_weights_are_not_trained(model_path, quantized):
    with pytest.raises(ConfigurationError, match=r"is quantized, and its weights can't be trained: .*Train adapters"):
        CausalLMPolicy(model_path, lora=None).build()


def test_a_kind_that_has_no_gradient_is_refused(model_path, quantized):
    quantized[0] = False
    with pytest.raises(ConfigurationError, match="is quantized by fbgemm_fp8, which passes no gradient"):
        CausalLMPolicy(model_path).build()


def test_unmerged_adapters_give_the_scores_of_the_adapters(model_path, quantized):
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=8))
    policy.build()
    assert policy.merged_for_scoring() is policy
    with pytest.raises(ConfigurationError, match=r"would be rounded: .* `--adapters true`"):
        policy.merged()


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_of_a_bitsandbytes_model_train_and_export(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=25, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=how, device_map={"": "cpu"})
    whole.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    policy = CausalLMPolicy(str(tmp_path / "base"), lora=LoRA(rank=2))
    policy.build()
    for name, param in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.2)
    (scores,) = policy.log_probs(Tokens.from_lists([[1, 5, 6]]), [Tokens.from_lists([[7, 8, 2]])])
    scores.tokens.sum().backward()
    assert all(param.grad is not None for param in policy.parameters() if param.requires_grad)
    with torch.no_grad():  # 8-bit layers compute otherwise in training than in evaluation
        (scores,) = policy.eval().log_probs(Tokens.from_lists([[1, 5, 6]]), [Tokens.from_lists([[7, 8, 2]])])
    policy.model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    policy.model.state_dict()  # which a checkpoint is made of, and must change nothing
    with torch.no_grad():
        (again,) = policy.log_probs(Tokens.from_lists([[1, 5, 6]]), [Tokens.from_lists([[7, 8, 2]])])
    assert torch.equal(again.tokens, scores.tokens)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    plain.train(bits == 4)  # else some CPUs compute in bfloat16
    with torch.no_grad():
        logits = plain(torch.tensor([[1, 5, 6, 7, 8, 2]])).logits[0, 2:5].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor([[7], [8], [2]]))[:, 0]
    torch.testing.assert_close(scores.tokens[0], expected, rtol=1e-3, atol=1e-3)
