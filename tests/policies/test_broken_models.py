"""A base model that is not what it should be is told in one line that names the file or weight and what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, Sampling
from prlhf_lightning.types import Tokens

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5012\n"


def save(folder: Path, model: PreTrainedModel, **options: str) -> Path:
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace weights, or leave them out; `__` stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    new = {name.replace("__", "."): weight for name, weight in changed.items()}
    kept = {name: weight for name, weight in (weights | new).items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changed: object) -> None:
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cut(path: Path, size: int = -100) -> None:
    path.write_bytes(path.read_bytes()[:size])


def refusal(folder: Path, **settings: str) -> str:
    """Return what is said of a base model, by whatever reads it first."""
    policy = CausalLMPolicy(str(folder), lora=None, **settings)
    with pytest.raises(ConfigurationError) as error:
        (policy.tokenizer, policy.build())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copied(model_path, tmp_path):
    return Path(shutil.copytree(model_path, tmp_path / "base"))


@pytest.fixture(scope="session")
def sharded_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return save(folder, AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), max_shard_size="20kB")


@pytest.fixture
def sharded(sharded_path, tmp_path):
    return Path(shutil.copytree(sharded_path, tmp_path / "base"))


# ---- weights that are missing, left over, of another shape, or no numbers


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lm_head__weight": None}, r"lack 1 weight of a LlamaForCausalLM, .*: lm_head\.weight\. Use"),
        ({"model__norm__weight": None}, r"lack 1 weight .*: model\.norm\.weight\. Use"),
        ({"model__norm__weight": torch.full((32,), torch.nan)}, r"1 weight with NaN or infinity in float32: model"),
        ({"model__norm__weight": torch.full((32,), torch.inf)}, r"1 weight with NaN or infinity in float32: model"),
        ({"model__norm__bias": torch.zeros(32)}, r"have 1 weight that a LlamaForCausalLM with .*: model\.norm\.bias;"),
        ({"model__norm__weight": torch.ones(16)}, r"model\.norm\.weight is \[16\] in the file and \[32\] here"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_configuration_are_named(copied, changed, says):
    edit_weights(copied, **changed)
    assert re.search(says, refusal(copied))


def test_a_configuration_of_another_size_is_refused(copied):
    edit_json(copied / "config.json", num_hidden_layers=1)
    assert "have 9 weights that a LlamaForCausalLM with this config.json lacks: model.layers.1." in refusal(copied)
    edit_json(copied / "config.json", num_hidden_layers=3)
    assert "lack 9 weights of a LlamaForCausalLM" in refusal(copied)


def test_a_bias_that_the_named_class_would_drop_is_refused(tmp_path):
    save(tmp_path, AutoModelForCausalLM.from_config(Qwen2Config(**SMALL)))
    edit_json(tmp_path / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert "have 6 weights that a LlamaForCausalLM with this config.json lacks" in refusal(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_policy(tmp_path, tied):
    config = LlamaConfig(**SMALL, num_labels=1, tie_word_embeddings=tied)
    save(tmp_path, AutoModelForSequenceClassification.from_config(config))
    said = refusal(tmp_path)
    assert "score.weight" in said
    assert "LlamaForSequenceClassification" in said


def test_a_value_head_beside_a_whole_model_is_left_out_and_told(copied, caplog):
    edit_weights(copied, v_head__summary__weight=torch.zeros(1, 32))
    CausalLMPolicy(str(copied)).build()
    assert caplog.messages == ["1 weight that a LlamaForCausalLM lacks, ignored: v_head.summary.weight."]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_whole_model_is_loaded_as_transformers_loads_it(model_paths, name, caplog):
    policy = CausalLMPolicy(model_paths[name], lora=None)
    policy.build(with_reference=False)
    plain = AutoModelForCausalLM.from_pretrained(model_paths[name]).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in policy.lm.state_dict().items())
    assert not caplog.messages


@pytest.mark.parametrize("zero", ["lm_head", "embed_tokens", r"layers\.1\.", "self_attn", "weight"])
def test_zeros_where_no_model_has_them_are_refused(copied, zero):
    weights = load_file(copied / "model.safetensors")
    edit_weights(
        copied, **{name: torch.zeros_like(weight) for name, weight in weights.items() if re.search(zero, name)}
    )
    assert re.search(r"weights? with zeros only, .*: (lm_head|model)\.", refusal(copied))


def test_layers_that_begin_by_changing_nothing_are_taken(copied):
    weights = load_file(copied / "model.safetensors")
    zero = [name for name in weights if re.search(r"layers\.1\..*(o_proj|down_proj)", name)]
    assert len(zero) == 2
    edit_weights(copied, **{name: torch.zeros_like(weights[name]) for name in zero})
    CausalLMPolicy(str(copied)).build()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_8_bit_matrices_that_nothing_describes_are_refused(copied, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(copied, **{name: (load_file(copied / "model.safetensors")[name] * 9).to(dtype)})
    assert f"model.safetensors holds {name} in 8 bits" in refusal(copied)


def test_float16_that_overflows_names_the_setting(copied):
    edit_weights(copied, model__norm__weight=torch.full((32,), 1e6))
    assert "NaN or infinity in float16: model.norm.weight. bfloat16 and float32 hold" in refusal(
        copied, dtype="float16"
    )
    CausalLMPolicy(str(copied), lora=None).build()


# ---- files that are not what they are called


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", POINTER, "model.safetensors is a git-lfs pointer and not the file itself; run `git lfs"),
        ("model.safetensors", "", "model.safetensors is empty; download it again"),
        ("model.safetensors", "<html>503</html>", "model.safetensors is an HTML page"),
        ("model.safetensors", "x" * 500, "model.safetensors (500 bytes) is cut off or damaged"),
        ("model.safetensors", None, "the folder holds no weights (model.safetensors or"),
        ("config.json", "<!DOCTYPE html><html>Sign in</html>", "config.json is an HTML page, such as a log-in"),
        ("config.json", '{"model_type": ', "config.json is not JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", None, "Cause: the folder holds no weights (config.json or"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer"),
        ("tokenizer.json", '{"version": "1.0", "model": {}}', "Cause: a file is damaged or of another format"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_named(copied, name, content, says):
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    assert says in refusal(copied)


def test_a_file_that_is_cut_off_is_named(copied):
    cut(copied / "model.safetensors")
    assert "model.safetensors (" in (said := refusal(copied))
    assert "is cut off or damaged" in said


def test_a_torch_file_is_checked_too(copied):
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    CausalLMPolicy(str(copied), lora=None).build()
    cut(copied / "pytorch_model.bin")
    assert "pytorch_model.bin (" in refusal(copied)
    torch.save({"a": print}, copied / "pytorch_model.bin")
    assert "a .bin file is damaged, or contains code besides weights" in refusal(copied)
    (copied / "pytorch_model.bin").write_text("rubbish")
    assert "pytorch_model.bin is not a `torch.save` file" in refusal(copied)


def test_shards_are_looked_for_and_checked_one_by_one(sharded):
    CausalLMPolicy(str(sharded), lora=None).build()
    index, shard = sharded / "model.safetensors.index.json", sorted(sharded.glob("model-00002-*"))[0]
    whole = shard.read_bytes()
    cut(shard)
    assert f"{shard.name} ({len(whole) - 100:,} bytes) is cut off" in refusal(sharded)
    shard.write_text(POINTER)
    assert f"{shard.name} is a git-lfs pointer" in refusal(sharded)
    shard.unlink()
    assert f"model.safetensors.index.json names {shard.name}, which is missing; download it again" in refusal(sharded)
    shard.write_bytes(whole)
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: place for name, place in places.items() if name != "lm_head.weight"})
    assert "lack 1 weight of a LlamaForCausalLM" in refusal(sharded)
    edit_json(index, weight_map=None)
    assert "model.safetensors.index.json has no 'weight_map'" in refusal(sharded)


def test_a_gguf_file_is_told_with_what_to_use_in_its_place(copied):
    for path in copied.iterdir():
        path.unlink()
    (copied / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (copied, copied / "tiny-Q4_K_M.gguf"):
        assert "tiny-Q4_K_M.gguf is GGUF, made to run and not to train; use the model that" in refusal(path)


# ---- other kinds of models


def test_models_of_other_kinds_are_refused(tmp_path):
    small = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    bert = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    kinds: list[tuple[PretrainedConfig, str]] = [
        (T5Config(**small, decoder_start_token_id=0), "transformers has no causal language model of its kind"),
        (BertConfig(**bert, num_hidden_layers=1), "weights of a BertLMHeadModel, which would be random"),
    ]
    for number, (config, says) in enumerate(kinds):
        assert says in refusal(save(tmp_path / str(number), AutoModel.from_config(config)))


def test_an_own_head_is_kept_where_the_configuration_says_tied(copied):
    edit_json(copied / "config.json", tie_word_embeddings=True)
    policy = CausalLMPolicy(str(copied), lora=None)
    policy.build()
    weights = load_file(copied / "model.safetensors")
    assert torch.equal(policy.lm.get_output_embeddings().weight, weights["lm_head.weight"])
    assert not policy.merged().config.tie_word_embeddings


# ---- tokenizer and embeddings


def test_more_tokens_than_embeddings_are_told_with_both_numbers(tmp_path):
    save(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "vocab_size": VOCAB - 2})))
    said = refusal(tmp_path)
    assert f"has ids up to {VOCAB - 1} and the model {VOCAB - 2} embeddings" in said
    assert "resize_token_embeddings" in said


def test_an_added_token_needs_an_embedding_as_after_resizing(copied):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(copied)
    assert "'<|im_start|>' would have none" in refusal(copied)
    model = AutoModelForCausalLM.from_pretrained(copied)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(copied)
    CausalLMPolicy(str(copied)).build()


@pytest.mark.parametrize("in_batches", [True, False])
def test_rows_of_a_padded_vocabulary_are_never_written(tmp_path, in_batches, monkeypatch):
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "vocab_size": VOCAB + 1000}))
    policy = CausalLMPolicy(str(save(tmp_path, lm)), lora=None)
    policy.build()
    policy._writes_in_batches = in_batches
    for temperature in (0.0, 1.0):
        written = policy.generate(Tokens.from_lists([[1, 5]] * 4), None, Sampling(8, temperature))
        assert int(written.ids.max()) < VOCAB


def test_what_reads_images_is_left_out_with_a_word(tmp_path, caplog):
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = Llama4Config(text_config=text, vision_config=vision)
    save(tmp_path, Llama4ForConditionalGeneration(config))
    CausalLMPolicy(str(tmp_path), lora=None).build(with_reference=False)
    (said,) = caplog.messages
    assert said.startswith("26 weights that a Llama4ForCausalLM lacks, ignored: multi_modal_projector")
