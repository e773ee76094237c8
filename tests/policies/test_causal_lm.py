from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, MambaConfig

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.policies.capabilities import find_capabilities
from prlhf_lightning.policies.scoring import Capabilities
from prlhf_lightning.types import SoftPrompt, Tokens

ARCHITECTURES = ["llama", "qwen", "gpt2", "neox"]
VOCAB = 25
SMALL = LoRA(rank=4)


def build(path: str, lora: LoRA | None = SMALL, **kwargs) -> CausalLMPolicy:
    policy = CausalLMPolicy(path, lora=lora, **kwargs)
    policy.build()
    if lora is not None:
        for name, param in policy.named_parameters():
            if "lora_B" in name:  # adapters that do something
                torch.nn.init.normal_(param, std=0.2)
    return policy


def brute_force(policy: CausalLMPolicy, prompt: list[int], completion: list[int], vectors: torch.Tensor) -> float:
    """Score one unpadded row position by position through the model's own full logits, in float64."""
    lm = policy.lm.double()
    embed = lm.get_input_embeddings()
    bos, rest = prompt[:1], prompt[1:]
    parts = [embed(torch.tensor(bos)), vectors.double(), embed(torch.tensor([*rest, *completion]))]
    logits = lm(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    start = len(prompt) + len(vectors)
    total = sum(torch.log_softmax(logits[start + i - 1], -1)[token].item() for i, token in enumerate(completion))
    policy.lm.float()
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_log_probs_equal_brute_force_over_ragged_rows(model_paths, name, data):
    policy = build(model_paths[name])
    token = st.integers(4, 20)
    rows = data.draw(st.integers(1, 3))
    prompts = [[1, *data.draw(st.lists(token, max_size=5))] for _ in range(rows)]
    completions = [data.draw(st.lists(token, min_size=1, max_size=6)) for _ in range(rows)]
    width = data.draw(st.integers(0, 3))
    vectors = torch.randn(rows, width, 32)
    mask = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(rows)], dtype=torch.bool)
    mask = mask.reshape(rows, width)
    with torch.no_grad():
        (scores,) = policy.log_probs(
            Tokens.from_lists(prompts), [Tokens.from_lists(completions)], SoftPrompt(vectors, mask)
        )
        expected = [
            brute_force(policy, p, c, v[m]) for p, c, v, m in zip(prompts, completions, vectors, mask, strict=True)
        ]
    torch.testing.assert_close(scores.sum, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reference_is_the_model_on_disk(model_paths, name):
    policy = build(model_paths[name])
    prompt, completion = Tokens.from_lists([[1, 5, 6]]), Tokens.from_lists([[7, 8, 2]])
    (scores,) = policy.reference_log_probs(prompt, [completion])
    lm = AutoModelForCausalLM.from_pretrained(model_paths[name])
    logits = lm(torch.tensor([[1, 5, 6, 7, 8, 2]])).logits.log_softmax(-1)
    expected = logits[0, [2, 3, 4], [7, 8, 2]]
    torch.testing.assert_close(scores.tokens[0], expected.detach(), rtol=1e-4, atol=1e-5)
    (trained,) = policy.log_probs(prompt, [completion])
    assert (trained.sum - scores.sum).abs() > 1e-3


def test_full_fine_tuning_keeps_a_frozen_reference(model_path):
    policy = build(model_path, lora=None)
    prompt, completion = Tokens.from_lists([[1, 5]]), Tokens.from_lists([[7, 2]])
    before = policy.reference_log_probs(prompt, [completion])[0].sum
    with torch.no_grad():
        for param in policy.lm.parameters():
            param.add_(0.1)
    torch.testing.assert_close(policy.reference_log_probs(prompt, [completion])[0].sum, before)
    assert all(param.requires_grad for param in policy.lm.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(model_path):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = build(model_path, gradient_checkpointing=checkpointing).train()
        vectors = torch.ones(2, 2, 32, requires_grad=True)
        prompt, completion = Tokens.from_lists([[1, 5], [1, 6, 7]]), Tokens.from_lists([[7, 2], [8]])
        policy.log_probs(prompt, [completion], SoftPrompt.full(vectors))[0].sum.sum().backward()
        grads.append([vectors.grad, *(p.grad for p in policy.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_scores_are_the_same_when_logits_come_in_chunks(model_path, monkeypatch):
    policy = build(model_path)
    prompt = Tokens.from_lists([[1, 5], [1, 6, 7]])
    completions = [Tokens.from_lists([[7, 2, 9], [8]]), Tokens.from_lists([[7], [8, 4, 4, 2]])]

    def run():
        policy.zero_grad()
        scores = policy.log_probs(prompt, completions)
        sum(s.sum.sum() for s in scores).backward()
        return [s.tokens.detach() for s in scores], [p.grad for p in policy.parameters() if p.requires_grad]

    whole = run()
    monkeypatch.setattr("prlhf_lightning.policies.sequences._LOGITS_PER_CHUNK", 2 * VOCAB)
    torch.testing.assert_close(whole, run())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_batch_generation_equals_one_by_one(model_paths, name):
    policy = build(model_paths[name])
    prompts, vectors = [[1, 5, 6, 7], [1, 4]], torch.randn(2, 3, 32)
    sampling = Sampling(max_new_tokens=8, temperature=0)
    together = policy.generate(Tokens.from_lists(prompts), SoftPrompt.full(vectors), sampling)
    for i, prompt in enumerate(prompts):
        alone = policy.generate(Tokens.from_lists([prompt]), SoftPrompt.full(vectors[i : i + 1]), sampling)
        assert together.ids[i][together.mask[i]].tolist() == alone.ids[0][alone.mask[0]].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_generation_picks_what_scoring_finds_likeliest(model_paths, name):
    policy = build(model_paths[name])
    prompt, soft_prompt = Tokens.from_lists([[1, 5, 6]]), SoftPrompt.full(torch.randn(1, 2, 32))
    written = policy.generate(prompt, soft_prompt, Sampling(max_new_tokens=1, temperature=0))
    candidates = Tokens.from_lists([[token] for token in range(VOCAB)])
    many = Tokens(prompt.ids.expand(VOCAB, -1), prompt.mask.expand(VOCAB, -1))
    vectors = SoftPrompt(soft_prompt.vectors.expand(VOCAB, -1, -1), soft_prompt.mask.expand(VOCAB, -1))
    (scores,) = policy.log_probs(many, [candidates], vectors)
    assert written.ids[0, 0].item() == scores.sum.argmax().item()


@pytest.mark.parametrize("random_init", [None, 0])
def test_cudnn_whose_attention_loses_gradients_is_not_used(model_path, random_init):
    torch.backends.cuda.enable_cudnn_sdp(True)
    build(model_path, random_init=random_init)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("lora", [SMALL, None])
def test_the_reference_writes_as_the_policy_did_before_training(model_path, lora):
    policy = CausalLMPolicy(model_path, lora=lora)
    policy.build(with_reference=True)
    how = (Tokens.from_lists([[1, 5, 6, 7], [1, 4]]), None, Sampling(max_new_tokens=8, temperature=0))
    before = policy.generate(*how).ids
    with torch.no_grad():
        for param in policy.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param))
    assert torch.equal(policy.generate(*how, reference=True).ids, before)
    assert policy.generate(*how).ids.tolist() != before.tolist()


def paths(policy: CausalLMPolicy):
    """Every way of scoring that the policy may take."""
    return {
        "logits": Capabilities(head=False, shared_prompt=False),
        "head": Capabilities(head=True, shared_prompt=False),
        "shared prompt": Capabilities(head=True, shared_prompt=True),
    }


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_way_of_scoring_gives_the_same_numbers(model_paths, name, lora, data):
    policy = build(model_paths[name], lora=lora).train()
    assert policy.shortcuts == Capabilities(head=True, shared_prompt=True, trees=True)
    token, rows = st.integers(4, 20), data.draw(st.integers(1, 3))
    prompt = Tokens.from_lists([[1, *data.draw(st.lists(token, max_size=9))] for _ in range(rows)])
    completions = [
        Tokens.from_lists([data.draw(st.lists(token, min_size=1, max_size=5)) for _ in range(rows)]) for _ in range(2)
    ]
    width = data.draw(st.integers(0, 3))
    mask = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(rows)], dtype=torch.bool)
    weights = torch.randn(2, rows)
    results = {}
    for way, shortcuts in paths(policy).items():
        policy.shortcuts = shortcuts
        policy.zero_grad()
        torch.manual_seed(1)
        vectors = torch.randn(rows, width, 32, requires_grad=True)
        scores = policy.log_probs(prompt, completions, SoftPrompt(vectors, mask.reshape(rows, width)))
        sum((w * score.sum).sum() for w, score in zip(weights, scores, strict=True)).backward()
        grads = [vectors.grad, *(p.grad for p in policy.parameters() if p.requires_grad)]
        results[way] = [*(score.tokens.detach() for score in scores), *(g for g in grads if g is not None)]
    for way in ("head", "shared prompt"):
        for tried, expected in zip(results[way], results["logits"], strict=True):
            # By norm: single elements may be small differences of large numbers, which float32 rounds.
            assert (tried - expected).norm() <= 1e-4 * expected.norm() + 2e-5


def test_a_model_that_caps_logits_uses_its_own_forward(model_path, monkeypatch):
    policy = build(model_path)
    forward = policy.lm.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    monkeypatch.setattr(policy.lm, "forward", capped)
    assert find_capabilities(policy.lm) == Capabilities(head=False, shared_prompt=False)


def test_a_compiled_model_gives_the_same_numbers_and_names(model_path, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(model_path, num_hidden_layers=1)  # all layers are traced alike, and slowly
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    compile_module = torch.nn.Module.compile
    # Traced and differentiated as ever, but without minutes of code generation.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))
    texts = [[[1, 5, 6], [1, 7]], [[8, 9, 2], [4, 2]], [[5, 2], [6, 7, 8, 2]]]
    prompt, chosen, rejected = (Tokens.from_lists(rows) for rows in texts)
    results = []
    for torch_compile in (False, True):
        torch.manual_seed(0)
        policy = build(str(tmp_path), torch_compile=torch_compile)
        vectors = SoftPrompt.full(torch.randn(2, 2, 32)).to(torch.float32)
        scores = policy.log_probs(prompt, [chosen, rejected], vectors)
        (scores[0].sum - scores[1].sum).sum().backward()
        grads = {name: param.grad for name, param in policy.named_parameters() if param.grad is not None}
        reference = policy.reference_log_probs(prompt, [chosen])
        written = policy.generate(prompt, vectors, Sampling(max_new_tokens=4, temperature=0.0))
        results.append((scores[0].tokens, scores[1].tokens, reference[0].tokens, written.ids, grads))
        names = set(policy.state_dict())
        assert policy.merged().config.use_cache
    assert names == set(build(str(tmp_path)).state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_backbone_dropout_is_off_and_adapter_dropout_on(model_paths):
    policy = build(model_paths["gpt2"], lora=LoRA(dropout=0.5)).train()
    prompt, completion = Tokens.from_lists([[1, 5]]), Tokens.from_lists([[7, 2]])
    reference = [policy.reference_log_probs(prompt, [completion])[0].sum for _ in range(2)]
    trained = [policy.log_probs(prompt, [completion])[0].sum for _ in range(2)]
    assert torch.equal(*reference)
    assert not torch.equal(*trained)


def test_too_long_a_sequence_names_the_settings(model_paths):
    policy = build(model_paths["gpt2"])
    with pytest.raises(ConfigurationError, match=r"65 positions .* exceeds the 64 .*max_prompt_length"):
        policy.log_probs(Tokens.from_lists([[1] + [5] * 62]), [Tokens.from_lists([[7, 2]])])


def test_too_long_a_text_to_write_names_the_setting(model_paths):
    policy = build(model_paths["gpt2"])
    with pytest.raises(ConfigurationError, match=r"sampling.max_new_tokens"):
        policy.generate(Tokens.from_lists([[1, 5]]), None, Sampling(max_new_tokens=63))


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, is_decoder):
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        is_decoder=is_decoder,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    policy = CausalLMPolicy(str(tmp_path), random_init=0)
    if is_decoder:
        policy.build()
    else:
        with pytest.raises(ConfigurationError, match="BertLMHeadModel whose tokens attend to later ones"):
            policy.build()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rank": 0}, "policy.lora.rank is 0"),
        ({"alpha": 0}, "policy.lora.alpha is 0"),
        ({"dropout": 1.0}, "policy.lora.dropout is 1.0"),
        ({"target_modules": []}, "policy.lora.target_modules is empty"),
    ],
)
def test_impossible_adapters_are_refused_by_name(settings, field):
    with pytest.raises(ConfigurationError, match=field):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens is 0"),
        ({"temperature": -0.1}, "sampling.temperature is -0.1"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0"),
        ({"top_p": 1.1}, "sampling.top_p is 1.1"),
    ],
)
def test_impossible_sampling_is_refused_by_name(settings, field):
    with pytest.raises(ConfigurationError, match=field):
        Sampling(**settings)


@pytest.mark.parametrize("target_modules", ["nope", ["nope"], ["q_proj", "nope"]])
def test_missing_layers_are_refused_with_those_that_exist(model_path, target_modules):
    with pytest.raises(ConfigurationError, match=r"target_modules is .*nope.* LlamaForCausalLM.* q_proj"):
        CausalLMPolicy(model_path, lora=LoRA(target_modules=target_modules)).build()


@pytest.mark.parametrize("target_modules", ["q_proj", ["q_proj", "v_proj"], ["self_attn.q_proj"], ".*[qv]_proj"])
def test_layers_can_be_named_in_every_way_that_peft_knows(model_path, target_modules):
    policy = build(model_path, lora=LoRA(rank=2, target_modules=target_modules))
    adapted = [name for name, param in policy.named_parameters() if param.requires_grad]
    assert adapted
    assert all("q_proj" in name or "v_proj" in name for name in adapted)


def test_layers_that_peft_cannot_adapt_are_named(tmp_path):
    MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"'out_proj'.* MambaForCausalLM.*peft says: .*incompatible"):
        CausalLMPolicy(str(tmp_path), lora=LoRA(target_modules="out_proj"), random_init=0).build()
    CausalLMPolicy(str(tmp_path), lora=LoRA(target_modules=["in_proj", "x_proj"]), random_init=0).build()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_the_merged_model_scores_the_same_and_changes_nothing(model_paths, name, lora):
    policy = build(model_paths[name], lora=lora)
    prompt, completion = Tokens.from_lists([[1, 5, 6]]), Tokens.from_lists([[7, 8, 2]])
    identity, before = policy.reference_identity(), policy.log_probs(prompt, [completion])[0].tokens
    merged = policy.merged()
    with torch.no_grad():
        scores = merged(torch.tensor([[1, 5, 6, 7, 8, 2]])).logits.log_softmax(-1)[0, [2, 3, 4], [7, 8, 2]]
    torch.testing.assert_close(scores, before[0], rtol=1e-4, atol=1e-5)
    assert merged.config.use_cache
    assert policy.reference_identity() == identity
    assert torch.equal(policy.log_probs(prompt, [completion])[0].tokens, before)


def test_an_unknown_builtin_model_is_refused_with_known_ones():
    with pytest.raises(ConfigurationError, match=r"'builtin:nope'.*builtin:byte-lm"):
        CausalLMPolicy("builtin:nope")


def test_a_missing_model_names_the_field(tmp_path):
    with pytest.raises(ConfigurationError, match=r"policy.model: the tokenizer of"):
        _ = CausalLMPolicy(str(tmp_path / "nothing")).tokenizer
    with pytest.raises(ConfigurationError, match=r"policy.model: the weights of"):
        CausalLMPolicy(str(tmp_path / "nothing")).build()


def test_random_init_needs_no_weights(model_path, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(model_path).save_pretrained(tmp_path)
    policy = CausalLMPolicy(str(tmp_path), lora=None, random_init=0)
    policy.build(with_reference=False)
    assert policy.token_embeddings().shape == (VOCAB, 32)
    with pytest.raises(ConfigurationError, match="without a reference"):
        policy.reference_log_probs(Tokens.from_lists([[1]]), [Tokens.from_lists([[7]])])
