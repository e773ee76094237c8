"""Vectors of texts: what they are, and that neither padding nor the batch changes them."""

import pytest
import torch
from conftest import VOCAB, make_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards import RewardBackbone

PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10], [1, 11]]
COMPLETIONS = [[12, 13, 14, 15, 2], [16, 2], [17, 18, 19, 2]]


def built(path, **settings):
    backbone = RewardBackbone(str(path), **settings)
    backbone.build()
    return backbone


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
def test_a_causal_model_is_read_at_its_last_real_token(model_paths, name):
    backbone = built(model_paths[name])
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    lm = AutoModelForCausalLM.from_pretrained(model_paths[name]).eval()
    for vector, prompt, completion in zip(backbone(PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, strict=True):
        hidden = lm(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(vector, hidden[0, -1], atol=1e-4)


def test_an_encoder_is_averaged_over_the_completion(encoder):
    backbone = built(encoder)
    model = BertModel.from_pretrained(encoder).eval()
    for vector, prompt, completion in zip(backbone(PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, strict=True):
        hidden = model(torch.tensor([prompt + completion])).last_hidden_state
        assert torch.allclose(vector, hidden[0, len(prompt) :].mean(0), atol=1e-5)


def test_the_batch_changes_no_vector(model_path):
    batched, alone = built(model_path), built(model_path, batch_size=1)
    assert torch.allclose(batched(PROMPTS, COMPLETIONS), alone(PROMPTS, COMPLETIONS), atol=1e-5)


def test_a_text_over_the_limit_keeps_its_completion(encoder):
    backbone = built(encoder)
    found = backbone([[1, *[5] * 30]], [[12, 13, 2]])
    expected = BertModel.from_pretrained(encoder).eval()(torch.tensor([[*[5] * 13, 12, 13, 2]])).last_hidden_state
    assert torch.allclose(found[0], expected[0, 13:].mean(0), atol=1e-5)


def test_the_identity_depends_on_the_pooling(model_path):
    assert built(model_path).identity() != built(model_path, pooling="mean").identity()


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigurationError, match=r"backbone\.pooling is 'max'"):
        RewardBackbone("any", pooling="max")
