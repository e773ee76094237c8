"""How tokens are drawn is one and the same for all writers, whatever the base's generation config says."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from chat_models import ANSWERS
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prlhf_lightning import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings, tokenizer_identity
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.policies.generation_settings import end_tokens_only, not_applied
from prlhf_lightning.types import Tokens
from prlhf_lightning.user_models import UniformUserModel

QUESTION = next(iter(ANSWERS))
GREEDY = Sampling(max_new_tokens=30, temperature=0.0)


@pytest.fixture(scope="module")
def opinionated(chat_model, tmp_path_factory):
    """A base whose generation config would change every answer."""
    folder = shutil.copytree(chat_model("qwen"), tmp_path_factory.mktemp("base") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, *_ = tokenizer(ANSWERS[QUESTION])["input_ids"]
    settings = {
        "eos_token_id": [2, 0], "repetition_penalty": 1.1, "top_k": 3, "min_p": 0.1, "typical_p": 0.9,
        "do_sample": True, "no_repeat_ngram_size": 2, "suppress_tokens": [first], "begin_suppress_tokens": [first],
        "min_new_tokens": 20, "bad_words_ids": [[first]], "forced_eos_token_id": 0, "max_length": 25,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def build(folder):
    policy = CausalLMPolicy(str(folder), lora=LoRA(rank=2))
    policy.build(with_reference=False)
    return policy


def asked(policy) -> Tokens:
    message = [{"role": "user", "content": QUESTION}]
    return Tokens.from_lists(
        [policy.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)]
    )


def by_transformers(policy, config) -> list[int]:
    """Return what plain transformers writes under a generation config."""
    lm, ids = AutoModelForCausalLM.from_pretrained(policy.path), asked(policy).ids
    lm.generation_config = config
    written = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    return written[0, ids.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore:The generation config")
def test_all_writers_agree_and_ignore_the_bases_settings(opinionated):
    policy = build(opinionated)
    neutral = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    expected = by_transformers(policy, neutral)
    assert policy.tokenizer.decode(expected, skip_special_tokens=True) == ANSWERS[QUESTION]
    assert by_transformers(policy, policy.generation_config) != expected

    assert policy.generate(asked(policy), None, GREEDY).ids[0].tolist() == expected
    policy._writes_in_batches = False
    assert policy.generate(asked(policy), None, GREEDY).ids[0].tolist() == expected
    user_model = UniformUserModel(num_tokens=0)
    user_model.build(1, policy.token_embeddings())
    writer = Generator(policy.lm, policy.tokenizer, user_model, UserVocabulary([]))
    message = [{"role": "user", "content": QUESTION}]
    assert list(writer.generate([GenerationRequest(message, max_new_tokens=30)])[0].ids) == expected
    exported = end_tokens_only(policy.tokenizer, policy.end_token_ids)
    assert by_transformers(policy, exported) == expected


def test_the_bases_own_config_is_as_before_after_writing(opinionated):
    policy = build(opinionated)
    with pytest.warns(UserWarning, match="repetition_penalty 1.1"):
        policy.generate(asked(policy), None, GREEDY)
    assert policy.lm.generation_config.repetition_penalty == 1.1


def test_settings_that_are_not_applied_are_named_once(opinionated):
    policy = build(opinionated)
    with pytest.warns(UserWarning, match=r"sets top_k 3, min_p 0.1, .*repetition_penalty 1.1.*These are not applied"):
        policy.generate(asked(policy), None, GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.generate(asked(policy), None, GREEDY)


@pytest.mark.parametrize(
    "config",
    [
        None,
        GenerationConfig(eos_token_id=[1, 2], max_new_tokens=9),
        GenerationConfig(temperature=1.0, top_p=1.0, repetition_penalty=1.0, do_sample=True),
    ],
    ids=["none", "ends only", "neutral values"],
)
def test_a_config_that_changes_nothing_is_not_mentioned(config):
    assert not_applied(config) == {}


def test_sampling_draws_from_all_tokens_of_a_greedy_base(model_path, tmp_path):
    folder = shutil.copytree(model_path, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": True, "top_k": 1}))
    policy = build(folder)
    prompt = Tokens.from_lists([[1, 5, 6]] * 8)
    with pytest.warns(UserWarning, match="top_k 1"):
        written = policy.generate(prompt, None, Sampling(max_new_tokens=6, temperature=1.0))
    assert len({tuple(row) for row in written.ids.tolist()}) > 1


def test_a_folder_without_generation_config_ends_by_its_config(model_path, tmp_path):
    folder = shutil.copytree(model_path, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))
    assert CausalLMPolicy(str(folder)).end_token_ids == (2, 7)


def test_an_end_token_that_is_no_id_is_refused_at_construction(model_path, tmp_path):
    folder = shutil.copytree(model_path, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "<|im_end|>"}))
    policy = CausalLMPolicy(str(folder))
    assert policy.tokenizer
    with pytest.raises(ConfigurationError, match=r"eos_token_id in generation_config\.json"):
        policy.build()


def test_rows_end_with_the_ends_of_the_generation_config_too(model_path, tmp_path):
    folder = shutil.copytree(model_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, end]}))
    row = parse_record({"user_id": "a", "prompt": "x", "chosen": "Yes.<end>\n", "rejected": "No."}, "f:1")
    policy = CausalLMPolicy(str(folder)).tokenizer
    (ids,) = FeedbackTokenizer(policy, TokenizationSettings())([row], ["f:1"])
    assert ids.chosen.tolist() == policy("Yes.<end>", add_special_tokens=False)["input_ids"]
    assert tokenizer_identity(policy) != tokenizer_identity(tokenizer)
