from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.policies.scoring import Shortcuts, find_shortcuts
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


def paths(policy: CausalLMPolicy):
    """Every way of scoring that the policy may take."""
    return {
        "logits": Shortcuts(head=False, shared_prompt=False),
        "head": Shortcuts(head=True, shared_prompt=False),
        "shared prompt": Shortcuts(head=True, shared_prompt=True),
    }


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_way_of_scoring_gives_the_same_log_probs_and_gradients(model_paths, name, lora, data):
    policy = build(model_paths[name], lora=lora).train()
    assert policy.shortcuts == Shortcuts(head=True, shared_prompt=True)
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
        torch.testing.assert_close(results[way], results["logits"], rtol=1e-4, atol=2e-5)


def test_a_model_that_caps_its_logits_is_scored_through_its_own_forward(model_path, monkeypatch):
    policy = build(model_path)
    forward = policy.lm.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    monkeypatch.setattr(policy.lm, "forward", capped)
    assert find_shortcuts(policy.lm) == Shortcuts(head=False, shared_prompt=False)


def test_gradient_checkpointing_computes_the_prompt_for_each_completion(model_path):
    assert not build(model_path, gradient_checkpointing=True).shortcuts.shared_prompt


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
