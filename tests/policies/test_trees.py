from __future__ import annotations

from functools import wraps

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.integrations import flex_attention as integration

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, capabilities, scoring
from prlhf_lightning.policies.capabilities import find_capabilities
from prlhf_lightning.policies.loading import load_lm
from prlhf_lightning.policies.prefix_sharing import BLOCK, PackedPrefixes, pack_prefixes
from prlhf_lightning.policies.scoring import Capabilities, score, segments
from prlhf_lightning.types import SoftPrompt, Tokens

ARCHITECTURES = ["llama", "qwen", "qwen3", "gpt2", "neox"]
SIZES = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
UNFIT = {
    "windows": MistralConfig(**GATED, sliding_window=256),
    "some windows": Gemma3TextConfig(**GATED),
    "windows of its own": GPTNeoConfig(
        vocab_size=25, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "no positions": BloomConfig(vocab_size=25, hidden_size=32, n_layer=2, n_head=4),
    "attention of its own": FalconConfig(vocab_size=25, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "recurrent": MambaConfig(vocab_size=25, hidden_size=32, num_hidden_layers=2),
}
ROWS = Capabilities(head=True, shared_prompt=False)
TREES = Capabilities(head=True, shared_prompt=False, trees=True)
RAGGED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def paths(model_paths, tmp_path_factory):
    """The models of conftest, and the configurations that only these tests need."""
    root = tmp_path_factory.mktemp("configs")
    for name, config in {"qwen3": Qwen3Config(**GATED), **UNFIT}.items():
        config.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return model_paths | {name: str(root / name) for name in ("qwen3", *UNFIT)}


def build(path: str, lora: LoRA | None = LoRA(rank=4), **kwargs) -> CausalLMPolicy:  # noqa: B008
    torch.manual_seed(0)
    policy = CausalLMPolicy(path, lora=lora, random_init=0, **kwargs)
    policy.build(with_reference=False)
    with torch.no_grad():
        for param in policy.parameters():  # so large that log-probs differ by more than rounding
            param.add_(0.2 * torch.randn_like(param))
    return policy.train()


@st.composite
def batches(draw, most_rows=3):
    """Ragged prompts, n completions of each, and soft prompts with holes."""
    token, rows, width = st.integers(4, 20), draw(st.integers(1, most_rows)), draw(st.integers(0, 3))
    prompt = Tokens.from_lists([[1, *draw(st.lists(token, max_size=9))] for _ in range(rows)])
    texts = st.lists(st.lists(token, min_size=1, max_size=5), min_size=rows, max_size=rows)
    completions = [Tokens.from_lists(draw(texts)) for _ in range(draw(st.integers(1, 3)))]
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)), dtype=torch.bool)
    return prompt, completions, SoftPrompt(torch.randn(rows, width, 32), mask.view(rows, width))


def results(policy, batch, way):
    """Log-probs and every gradient, that of the soft prompt included, in one way of scoring."""
    policy.zero_grad()
    prompt, completions, soft_prompt = batch
    vectors = soft_prompt.vectors.clone().requires_grad_()
    before = segments(policy.lm, 1, prompt, SoftPrompt(vectors, soft_prompt.mask))
    scores = score(policy.lm, before, completions, way, as_trees=way.trees)
    sum((i + 1) * score.tokens.square().sum() for i, score in enumerate(scores)).backward()
    grads = {name: param.grad for name, param in policy.named_parameters() if param.grad is not None}
    if soft_prompt.mask.any():
        grads["soft prompt"] = vectors.grad
    return {i: score.tokens.detach() for i, score in enumerate(scores)} | grads


def assert_equal(tried, expected, tolerance=1e-5):
    assert tried.keys() == expected.keys()
    # What is zero but for rounding, such as a query's gradient where there is one key, is rounded at the others' scale.
    rounding = 0.1 * tolerance * torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (tried[name] - value).norm() <= tolerance * value.norm() + rounding, name


def pack(monkeypatch, mask=PackedPrefixes.dense_mask):
    """Score as on a GPU, trees many in a row, but with a mask that a CPU can go backward through."""
    monkeypatch.setattr(capabilities, "takes_block_masks", lambda lm, device: True)
    monkeypatch.setattr(scoring, "takes_block_masks", lambda lm, device: True)
    monkeypatch.setattr(PackedPrefixes, "block_mask", mask)


@pytest.mark.parametrize("packed", [False, True], ids=["a tree a row", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trees_give_the_log_probs_and_gradients_of_padded_rows(paths, name, lora, checkpointing, packed, monkeypatch):
    policy = build(paths[name], lora=lora, gradient_checkpointing=checkpointing)
    assert policy.shortcuts.trees
    pack(monkeypatch)
    if not packed:
        monkeypatch.setattr(scoring, "_MAX_ROW", 1)
    policy.double()  # in which nothing is large but for an error, however the gradients cancel

    @settings(RAGGED, max_examples=4)
    @given(batch=batches())
    def check(batch):
        assert_equal(results(policy, batch, TREES), results(policy, batch, ROWS), tolerance=1e-6)

    check()


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_single_precision_trees_equal_padded_rows_to_1e_5(paths, name, lora, monkeypatch):
    policy = build(paths[name], lora=lora)
    pack(monkeypatch)
    prompt = Tokens.from_lists([[1, *range(4, 20)], [1, 7], [1], [1, 9, 3, 3, 8]])
    completions = [
        Tokens.from_lists([[5, 6, 7, 8, 2], [7], [8, 2], [4, 4]]), Tokens.from_lists([[4], [9, 9, 2], [3], [2]])
    ]  # fmt: skip
    batch = (
        prompt,
        completions,
        SoftPrompt(torch.randn(4, 3, 32), torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()),
    )
    assert_equal(results(policy, batch, TREES), results(policy, batch, ROWS))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_masks_show_the_trunk_and_the_own_branch_so_far(data):
    trees, n, trees_in_row = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)))
    segment = lambda low: st.lists(st.integers(low, 90), min_size=trees, max_size=trees)  # noqa: E731
    lengths = [data.draw(segment(1)), *(data.draw(segment(0)) for _ in range(n))]
    parts = [SoftPrompt(torch.zeros(trees, 90, 1), torch.arange(90) < torch.tensor(part)[:, None]) for part in lengths]
    forest = pack_prefixes(parts[:1], parts[1:], trees_in_row, BLOCK)
    rows, width = forest.trunk.shape
    expected = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)
    for row in range(rows):
        places = [
            (tree, part)
            for tree in range(row * trees_in_row, min(trees, (row + 1) * trees_in_row))
            for part in range(n + 1)
            for _ in range(lengths[part][tree])
        ]
        for q, (tree, part) in enumerate(places):
            expected[row, q, : q + 1] = torch.tensor([t == tree and p in (0, part) for t, p in places[: q + 1]])
    assert torch.equal(forest.dense_mask()[:, 0], expected)
    blocks, torchs = forest.block_mask(), create_block_mask(forest.may_see, rows, None, width, width, "cpu")
    assert torch.equal(blocks.to_dense(), torchs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        count = getattr(torchs, f"{kind}_num_blocks")
        assert torch.equal(getattr(blocks, f"{kind}_num_blocks"), count)
        listed = torch.arange(width // BLOCK) < count[..., None]
        assert torch.equal(getattr(blocks, f"{kind}_indices")[listed], getattr(torchs, f"{kind}_indices")[listed])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flex_attention_under_the_mask_scores_as_sdpa_does(paths, name, monkeypatch):
    policy, calls = build(paths[name], packing=True), []

    def eager(*args, training, **kwargs):
        calls.append(kwargs["block_mask"])
        return flex_attention(*args, **kwargs)

    prompt = Tokens.from_lists([[1, *range(4, 20)] * 8, [1, 7], [1, 9, 3]])
    completions = [Tokens.from_lists([[5, 6] * 30, [7], [8, 2]]), Tokens.from_lists([[4], [9, 9, 2] * 20, [3]])]
    with torch.no_grad():
        expected = policy.log_probs(prompt, completions)
        pack(monkeypatch, PackedPrefixes.block_mask)
        monkeypatch.setattr(integration, "compile_friendly_flex_attention", eager)
        tried = policy.log_probs(prompt, completions)
    assert [mask.shape for mask in calls[-2:]] == 2 * [(1, 1, 3 * BLOCK, 3 * BLOCK)]  # two layers
    for a, b in zip(tried, expected, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [False, True])
def test_packing_is_tried_where_the_policy_is_before_it_is_used(model_path, monkeypatch, wrong):
    policy, batch = build(model_path, packing=True), (Tokens.from_lists([[1, 5]]), [Tokens.from_lists([[7]])])
    pack(monkeypatch, lambda forest: forest.dense_mask() | wrong)
    if wrong:
        with pytest.raises(ConfigurationError, match=r"policy\.packing: .* on this device \(cpu\)"):
            policy.log_probs(*batch)
    else:
        assert policy.log_probs(*batch)[0].tokens.shape == (1, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
def test_packed_trees_give_the_numbers_of_padded_rows_on_a_gpu(paths, lora, checkpointing):
    policy = build(paths["qwen3"], packing=True, lora=lora, gradient_checkpointing=checkpointing).cuda()
    assert scoring.takes_block_masks(policy.lm, torch.device("cuda"))
    for length in (5, 200, 90):  # in one block, over several, and compiled for another width
        prompt = Tokens.from_lists([[1, *range(4, 20)] * (length // 16 + 1), [1, 7], [1, 9, 3]]).to("cuda")
        texts = [[[5, 6] * length, [7], [8, 2]], [[4], [9, 9, 2] * length, [3]]]
        completions = [Tokens.from_lists(rows).to("cuda") for rows in texts]
        batch = prompt, completions, SoftPrompt.full(torch.randn(3, 2, 32, device="cuda"))
        assert_equal(results(policy, batch, TREES), results(policy, batch, ROWS), tolerance=5e-3)  # TF32 may be on


@pytest.mark.parametrize("name", ["gpt2", *UNFIT])
def test_models_that_cannot_be_packed_say_so_and_are_padded(paths, name):
    with pytest.warns(UserWarning, match=r"policy\.packing: .* padded rows"):
        policy = build(paths[name], packing=True, lora=None)
    assert policy.shortcuts.trees == (name == "gpt2")  # which FlexAttention alone doesn't fit
    batch = Tokens.from_lists([[1, 5, 6, 7], [1, 8]]), [Tokens.from_lists([[4, 2], [5]]), Tokens.from_lists([[6], [9]])]
    plain = build(paths[name], lora=None)
    for a, b in zip(policy.log_probs(*batch), plain.log_probs(*batch), strict=True):
        assert torch.equal(a.tokens, b.tokens)


def change_trees(monkeypatch, lm, ignored: str | None, rounding: float = 0.0) -> None:
    """Have a model go by places in the row, or round otherwise, where it computes trees."""
    base = lm.base_model
    forward = base.forward

    @wraps(forward)
    def changed(**inputs):
        if inputs["attention_mask"].ndim < 4:
            return forward(**inputs)
        output = forward(**inputs | ({ignored: None} if ignored else {}))
        states = output.last_hidden_state
        output.last_hidden_state = states * (1 + rounding * torch.randn_like(states))
        return output

    monkeypatch.setattr(base, "forward", changed)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_goes_by_places_in_the_row_is_found_out(model_path, monkeypatch, ignored):
    policy = build(model_path)
    change_trees(monkeypatch, policy.lm, ignored)
    assert find_capabilities(policy.lm) == Capabilities(head=True, shared_prompt=True)


@pytest.mark.parametrize("ignored", [None, "attention_mask", "position_ids"])
def test_rounding_in_bfloat16_is_told_from_wrong_attention(model_path, monkeypatch, ignored):
    lm = load_lm(model_path, dtype="bfloat16")
    lm.lm_head.weight.data.mul_(4)  # log-probs as far apart as those of a trained model
    change_trees(monkeypatch, lm, ignored, rounding=2.0**-8)  # as another kernel may
    assert find_capabilities(lm).trees == (ignored is None)


LONG, SHORT = Tokens.from_lists([[1, *[5] * 30], [1, 6]]), Tokens.from_lists([[1], [1]])
BRANCHES = [Tokens.from_lists([[7, 2, 3], [8]]), Tokens.from_lists([[7], [8, 9]])]


@pytest.mark.parametrize(
    ("prompt", "completions", "checkpointing", "sharded", "width"),
    [
        (LONG, BRANCHES, True, False, 31 + 4),
        (LONG, BRANCHES, False, True, 31 + 4),
        (LONG, BRANCHES, False, False, 2),  # continued from the prompt's keys and values, which is quicker still
        (SHORT, BRANCHES, True, False, 1 + 3),  # a row of each completion, the prompt in both
        (LONG, BRANCHES[:1], True, False, 31 + 3),
        (LONG, 2 * BRANCHES, True, False, 31 + 3),
    ],
)
def test_trees_are_taken_where_they_pay_and_no_cache_is_kept(
    model_path, prompt, completions, checkpointing, sharded, width
):
    policy, widths = build(model_path, gradient_checkpointing=checkpointing), []
    if sharded:
        policy.prepare_for_sharding()
    policy.lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    policy.log_probs(prompt, completions)
    assert widths[-1] == width


def test_the_head_sees_only_positions_that_predict_completions(model_path, monkeypatch):
    policy, seen = build(model_path, gradient_checkpointing=True), []
    real = scoring.token_log_probs
    monkeypatch.setattr(scoring, "token_log_probs", lambda hidden, *rest: seen.append(hidden) or real(hidden, *rest))
    policy.log_probs(LONG, BRANCHES)
    assert [hidden.shape for hidden in seen] == [(7, 32)]


def test_packing_and_torch_compile_exclude_one_another(model_path):
    with pytest.raises(ConfigurationError, match=r"policy\.packing .* policy\.torch_compile"):
        CausalLMPolicy(model_path, packing=True, torch_compile=True)
