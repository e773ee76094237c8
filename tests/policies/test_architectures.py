"""Models that differ from most in what they keep, take or return; small ones with random weights."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from transformers import (
    BambaConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    Zamba2Config,
)

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.policies.continuation import cache_of
from prlhf_lightning.types import Tokens, Users
from prlhf_lightning.user_models import IndividualUserModel

SMALL = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.2}
MAMBA = MambaConfig(**SMALL, state_size=8)
ATTENTION = {**SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MINIMAX = MiniMaxConfig(**ATTENTION, head_dim=8, num_local_experts=2)
MIXTRAL = MixtralConfig(**ATTENTION, num_local_experts=4)
# With the auxiliary loss, as their makers train them.
EXPERTS = [
    MixtralConfig(**ATTENTION, num_local_experts=4, output_router_logits=True),
    Qwen3MoeConfig(
        **ATTENTION, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, output_router_logits=True
    ),
    OlmoeConfig(**ATTENTION, num_experts=4, num_experts_per_tok=2, output_router_logits=True),
    PhimoeConfig(**ATTENTION, num_local_experts=4, output_router_logits=True),
    GptOssConfig(**ATTENTION, head_dim=8, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
]
JAMBA = JambaConfig(**ATTENTION, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8)
LLAMA4 = Llama4TextConfig(**ATTENTION, head_dim=8, num_local_experts=2, intermediate_size_mlp=64)
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
BAMBA = BambaConfig(**ATTENTION, attn_layer_indices=[1], **MAMBA2)
RWKV = RwkvConfig(vocab_size=25, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64)
GRIFFIN = RecurrentGemmaConfig(**{**ATTENTION, "num_hidden_layers": 3}, head_dim=8, lru_width=32)
ZAMBA2 = Zamba2Config(
    **{**SMALL, "num_hidden_layers": 4},
    **{"intermediate_size": 64, "num_attention_heads": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]},
    **{"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16},
    **{"num_mem_blocks": 1, "adapter_rank": 4, "time_step_min": 0.05},  # below which it reads, but does not go on
)
PROMPTS, ANSWERS = [[1, 5, 6], [1, 7, 8, 9, 10]], [[4, 20, 2], [11, 2]]


@pytest.fixture
def build(tmp_path):
    def build(config: PretrainedConfig, **settings) -> CausalLMPolicy:
        config.save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        policy = CausalLMPolicy(str(tmp_path), random_init=0, **{"lora": None, **settings})
        policy.build()
        return policy

    return build


def plain(policy: CausalLMPolicy, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Score one row by the model's own logits."""
    logits = policy.lm(torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]


def test_a_model_in_16_bits_may_return_states_of_32(build):
    policy = build(MAMBA, dtype="bfloat16")
    (scores,) = policy.log_probs(Tokens.from_lists(PROMPTS), [Tokens.from_lists(ANSWERS)])
    expected = torch.cat([plain(policy, *row) for row in zip(PROMPTS, ANSWERS, strict=True)])
    torch.testing.assert_close(scores.tokens[scores.mask], expected, rtol=0.02, atol=0.02)


def test_a_model_with_other_states_is_not_continued_from_keys(build):
    policy = build(MINIMAX)
    answers, prompt_of = [[4, 20, 2], [11, 2], [5, 6, 7, 2], [8, 9, 2]], [0, 1, 1, 0]
    scores = policy.grouped_log_probs(
        Tokens.from_lists(PROMPTS), Tokens.from_lists(answers), torch.tensor(prompt_of), batch_size=1
    )
    with torch.no_grad():
        expected = [plain(policy, PROMPTS[row], answer) for row, answer in zip(prompt_of, answers, strict=True)]
    torch.testing.assert_close(scores.tokens[scores.mask], torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [MAMBA, JAMBA, LLAMA4], ids=lambda config: config.model_type)
def test_all_linear_layers_are_those_that_an_adapter_can_act_on(build, config):
    policy = build(config, lora=LoRA(rank=2))
    for name, param in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.2)
    (scores,) = policy.log_probs(Tokens.from_lists(PROMPTS), [Tokens.from_lists(ANSWERS)])
    scores.tokens.sum().backward()
    adapted = {name: param for name, param in policy.named_parameters() if param.requires_grad}
    assert any("in_proj" in name or "q_proj" in name for name in adapted)
    assert [name for name, param in adapted.items() if param.grad is None] == []
    assert [name for name in adapted if "mamba.out_proj" in name or "router" in name or "lm_head" in name] == []
    with torch.no_grad():
        logits = policy.merged()(torch.tensor([[*PROMPTS[1], *ANSWERS[1]]])).logits[0, 4:-1].log_softmax(-1)
    torch.testing.assert_close(scores.tokens[1, :2], logits.gather(-1, torch.tensor([[11], [2]]))[:, 0])


def test_experts_are_adapted_quietly_and_scored_in_place(build, recwarn):
    policy = build(MIXTRAL, lora=LoRA(rank=2))
    assert not [warned for warned in recwarn if "_pattern keys" in str(warned.message)]
    experts = [param for name, param in policy.named_parameters() if "experts" in name and "lora_B" in name]
    for param in experts:
        torch.nn.init.normal_(param, std=0.2)
    before, answers = Tokens.from_lists(PROMPTS), [Tokens.from_lists(ANSWERS)]
    (adapted,), (reference,) = policy.log_probs(before, answers), policy.reference_log_probs(before, answers)
    assert (adapted.tokens - reference.tokens).abs().max() > 0.01
    torch.testing.assert_close(policy.merged_for_scoring().log_probs(before, answers)[0].tokens, adapted.tokens)


# With a memory that is not keys and values; that transformers' generate gives no vectors; that is padded wrongly; and
# with a memory that can't be handed on, or gives other numbers; and mixtures of experts.
@pytest.mark.parametrize(
    "config", [MAMBA, BAMBA, RWKV, GRIFFIN, ZAMBA2, *EXPERTS], ids=lambda config: config.model_type
)
def test_batched_writing_follows_the_models_own_logits(build, config):
    torch.manual_seed(0)
    policy = build(config)
    users = IndividualUserModel(num_tokens=3)
    users.build(3, policy.token_embeddings())
    torch.nn.init.normal_(users.offsets.weight, std=0.5)
    writer = Generator(policy.lm, policy.tokenizer, users, UserVocabulary(["ann", "bob"]))
    asked = [("ann", "the cat sat"), ("bob", "a"), ("ann", "hello user likes long answers"), ("bob", "red sun")]
    prompts = [policy.tokenizer(prompt)["input_ids"] for _, prompt in asked]
    soft_prompt = users(Users(torch.tensor([1, 2, 1, 2])))
    expected = []
    for prompt, vectors in zip(prompts, soft_prompt.vectors, strict=True):
        ids, table = [], policy.lm.get_input_embeddings()
        while len(ids) < 8 and ids[-1:] != [policy.tokenizer.eos_token_id]:
            words = table(torch.tensor([*prompt, *ids]))
            with torch.no_grad():
                logits = policy.lm(
                    inputs_embeds=torch.cat([words[:1], vectors, words[1:]])[None], use_cache=False
                ).logits
            ids.append(int(logits[0, -1].argmax()))
        expected.append(ids)
    written = policy.generate(Tokens.from_lists(prompts), soft_prompt, Sampling(8, temperature=0.0))
    assert [ids[mask].tolist() for ids, mask in zip(written.ids, written.mask, strict=True)] == expected
    wanted = [GenerationRequest(prompt, user, max_new_tokens=8) for user, prompt in asked]
    assert [list(one.ids) for one in writer.generate(wanted, max_batch_rows=3)] == expected
    assert len({token for ids in expected for token in ids}) > 2


def test_a_model_that_writes_one_text_at_a_time_samples_as_told(build):
    policy = build(BAMBA)
    prompts = Tokens.from_lists(PROMPTS * 20)
    surely = policy.generate(prompts, None, Sampling(3, temperature=0.0))
    nearly = policy.generate(prompts, None, Sampling(3, temperature=1.0, top_p=1e-6))
    freely = policy.generate(prompts, None, Sampling(3, temperature=1.0))
    assert torch.equal(surely.ids, nearly.ids)
    assert len({tuple(ids) for ids in freely.ids.tolist()}) > 10


@pytest.mark.parametrize(("config", "memory"), [(MAMBA, "cache"), (RWKV, "state"), (GRIFFIN, None), (ZAMBA2, None)])
def test_a_cache_that_gives_the_same_numbers_is_used(build, config, memory):
    assert cache_of(build(config).lm.eval()) == memory
