"""What is written does not depend on what else is being written, and is what the formulas say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.inference import Engine, GenerationRequest, Generator
from prlhf_lightning.inference.guidance import conditions
from prlhf_lightning.inference.kv_cache import BatchedKVCache
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.types import SoftPrompt, Tokens, Users
from prlhf_lightning.user_models import (
    CompositeUserModel,
    IndividualUserModel,
    TextUserModel,
    UniformUserModel,
    UserModel,
)

IDS = ["ann", "bob", "cy"]
PROMPTS = ["the cat sat", "a", "hello user likes long answers", "red sun", "dog ran fast slow", "no"]


def make_writer(path: str, user_model: UserModel | None = None) -> tuple[Generator, CausalLMPolicy]:
    torch.manual_seed(0)
    policy = CausalLMPolicy(path, lora=LoRA(rank=4))
    policy.build(with_reference=False)
    user_model = user_model or IndividualUserModel(num_tokens=3)
    user_model.build(len(IDS) + 1, policy.token_embeddings())
    for name, param in [*policy.named_parameters(), *user_model.named_parameters()]:
        if "lora_B" in name or "offsets" in name:
            nn.init.normal_(param.data, std=1.0)
    for table in user_model.row_tables():
        table.data[0] = 0.0
    vocabulary = UserVocabulary(IDS)
    return Generator(policy.lm, policy.tokenizer, user_model, vocabulary), policy


@pytest.fixture(scope="module")
def llama(model_paths):
    return make_writer(model_paths["llama"])


def by_policy(writer, policy, prompt: str, row: int, count: int) -> tuple[int, ...]:
    """Write one text with the policy's own `generate`."""
    ids = writer.tokenizer(prompt)["input_ids"]
    soft_prompt = writer.user_model(Users(torch.tensor([row])))
    written = policy.generate(Tokens.from_lists([ids]), soft_prompt, Sampling(count, temperature=0.0))
    return tuple(written.ids[0][written.mask[0]].tolist())


def everyone(**how) -> list[GenerationRequest]:
    users = ["ann", "bob", None, "cy", {"ann": 0.3, "cy": 0.7}, "stranger"]
    return [
        GenerationRequest(
            prompt, users[i % 6], strength=[1.0, 0.5, 2.0, 0.0][i % 4], max_new_tokens=3 + 5 * (i % 4), **how
        )
        for i, prompt in enumerate(PROMPTS * 3)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
def test_greedy_text_in_a_crowd_is_what_the_policy_writes_alone(model_paths, name):
    writer, policy = make_writer(model_paths[name])
    asked = [GenerationRequest(PROMPTS[i % 6], IDS[i % 3], max_new_tokens=4 + 3 * (i % 5)) for i in range(12)]
    written = writer.generate(asked, max_batch_rows=4)  # so that rows join and leave all the time
    alone = [by_policy(writer, policy, one.prompt, 1 + i % 3, one.max_new_tokens) for i, one in enumerate(asked)]
    assert [one.ids for one in written] == alone
    assert len({token for ids in alone for token in ids}) > 4  # and not one token over and over


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}], ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_what_else_is_written(model_paths, name, how):
    writer, _ = make_writer(model_paths[name])
    asked = everyone(**how)
    alone = [writer.generate([one])[0] for one in asked]
    assert writer.generate(asked, max_batch_rows=5) == alone
    assert writer.generate(asked[::-1])[::-1] == alone


def test_strength_0_is_the_generic_user_and_1_the_user(llama):
    writer, policy = llama
    for row, user in enumerate(IDS, start=1):
        asked = [GenerationRequest("the cat", user, strength=s, max_new_tokens=12) for s in (0.0, 1.0)]
        generic, own = (one.ids for one in writer.generate(asked))
        assert generic == by_policy(writer, policy, "the cat", 0, 12)
        assert own == by_policy(writer, policy, "the cat", row, 12)
        assert generic != own


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.5, 3.0])
def test_logits_between_and_beyond_are_the_formula_in_float64(llama, strength):
    writer, _ = llama
    prepared = writer.prepare(GenerationRequest("the cat sat", "bob", strength=strength))
    rows = BatchedKVCache(writer.lm).append(writer.sequences([prepared]))
    mixed = sum(part.weight * logits for part, logits in zip(prepared.conditions, rows, strict=True))

    lm, ids = writer.lm.double(), writer.tokenizer("the cat sat")["input_ids"]

    def logits(row: int) -> torch.Tensor:
        words = lm.get_input_embeddings()(torch.tensor(ids))
        vectors = writer.user_model(Users(torch.tensor([row]))).vectors[0].double()
        return lm(inputs_embeds=torch.cat([words[:1], vectors, words[1:]])[None]).logits[0, -1]

    with torch.no_grad():
        generic, own = logits(0), logits(2)
    lm.float()
    expected = generic + strength * (own - generic)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-4, atol=1e-4)
    token = writer.generate([GenerationRequest("the cat sat", "bob", strength=strength, max_new_tokens=1)])[0].ids[0]
    assert token == int(expected.argmax())
    assert (generic - own).abs().max() > 0.1


def test_a_blend_of_vectors_is_their_weighted_mean(llama):
    writer, _ = llama
    (blend,) = writer.prepare(GenerationRequest("a", {"ann": 0.25, "cy": 0.75})).conditions
    vectors = writer.user_model(Users(torch.tensor([1, 3]))).vectors.double()
    torch.testing.assert_close(blend.vectors.double(), 0.25 * vectors[0] + 0.75 * vectors[1])
    (same,) = writer.prepare(GenerationRequest("a", {"ann": 1.0, "cy": 3.0})).conditions  # shares count by their ratio
    assert torch.equal(same.vectors, blend.vectors)
    (stranger,) = writer.prepare(GenerationRequest("a", {"nobody": 1.0})).conditions
    assert torch.equal(stranger.vectors, writer.user_model.generic_prompt)


class Ragged(UserModel):
    """Gives user number n as many vectors."""

    def build(self, num_rows, token_embeddings):
        self.vectors = nn.Parameter(torch.randn(num_rows, num_rows, token_embeddings.shape[1]))

    def forward(self, users):
        vectors = self.vectors[users.rows]
        return SoftPrompt(vectors, torch.arange(vectors.shape[1]) <= users.rows[:, None])


def test_soft_prompts_of_unequal_length_are_blended_by_logits(model_paths):
    writer, _ = make_writer(model_paths["llama"], Ragged())
    parts = writer.prepare(GenerationRequest("a", {"ann": 0.4, "cy": 0.6}, strength=0.5)).conditions
    assert [(part.weight, len(part.vectors)) for part in parts] == [(0.5, 1), (0.2, 2), (0.3, 4)]
    asked = [GenerationRequest(prompt, {"ann": 0.4, "cy": 0.6}, strength=0.5, max_new_tokens=6) for prompt in PROMPTS]
    assert writer.generate(asked, max_batch_rows=7) == [writer.generate([one])[0] for one in asked]
    with pytest.raises(ConfigurationError, match="takes 3 rows, more than max_batch_rows"):
        Engine(writer, max_batch_rows=2).add(asked[0])


def test_the_users_text_stays_at_strength_0(model_paths):
    writer, _ = make_writer(model_paths["llama"], CompositeUserModel([IndividualUserModel(2), TextUserModel()]))
    asked = GenerationRequest("a", "ann", user_text="likes short answers", strength=0.0)
    prepared = writer.prepare(asked)
    (generic,) = prepared.conditions
    words = writer.lm.get_input_embeddings()(torch.tensor(writer.tokenizer("likes short answers\n")["input_ids"][1:]))
    torch.testing.assert_close(generic.vectors[2:], words)
    assert prepared.prompt_tokens == 2 + 3
    assert len(conditions(asked, writer.user_model, writer.vocabulary, None)[0].vectors) == 2


@pytest.mark.parametrize("user_model", [UniformUserModel(0), TextUserModel()], ids=["vanilla", "text"])
def test_models_that_tell_no_users_apart_write_the_same_for_all(model_paths, user_model):
    writer, _ = make_writer(model_paths["llama"], user_model)
    asked = [
        GenerationRequest("the cat", user, strength=s, max_new_tokens=6) for user in ("ann", None) for s in (0, 1, 2)
    ]
    assert len({answer.ids for answer in writer.generate(asked)}) == 1
    assert len(writer.prepare(asked[2]).conditions) == 1


def test_a_text_that_no_user_model_reads_is_refused(llama):
    with pytest.raises(ConfigurationError, match="IndividualUserModel reads no text"):
        llama[0].prepare(GenerationRequest("a", user_text="likes short answers"))


def test_a_stranger_is_the_generic_user_and_reported(llama):
    stranger, nobody, ann = llama[0].generate([GenerationRequest("the", user) for user in ("eve", None, "ann")])
    assert stranger.ids == nobody.ids
    assert (stranger.known_user, nobody.known_user, ann.known_user) == (False, False, True)


def test_seeds_decide_samples(llama):
    def sample(seed):
        return (
            llama[0].generate([GenerationRequest("the", "ann", temperature=1.5, seed=seed, max_new_tokens=20)])[0].ids
        )

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_engine_admits_as_rows_become_free_and_cancels(llama):
    engine = Engine(llama[0], max_batch_rows=2)
    first, second, third = (
        engine.add(GenerationRequest("the", "ann", max_new_tokens=9, strength=s)) for s in (1, 1, 0.5)
    )
    assert {piece.number for piece in engine.step()} == {first, second}
    assert (engine.running, engine.waiting) == (2, 1)  # the third takes two rows
    engine.cancel(first)
    assert {piece.number for piece in engine.step()} == {second}
    engine.cancel(second)
    assert [piece.number for piece in engine.step()] == [third]
    engine.cancel(third)
    assert engine.idle
    assert engine.step() == []


def test_a_long_text_does_not_pad_the_short_ones_in_memory(llama):
    short = [GenerationRequest("the cat", user, max_new_tokens=4) for user in IDS * 4]
    long, longest = (GenerationRequest("a " * words, "ann", strength=0.5, max_new_tokens=4) for words in (40, 90))
    asked = [*short, long, *short, longest, *short]
    engine, texts = Engine(llama[0], max_batch_tokens=120), [[] for _ in asked]
    for one in asked:
        engine.add(one)
    while not engine.idle:
        for piece in engine.step():
            texts[piece.number].append(piece.text)
        rows, width = engine._rows._mask.shape
        assert rows * width <= 120 or rows == 2  # the longest, alone
    assert ["".join(pieces) for pieces in texts] == [one.text for one in llama[0].generate(asked)]


def test_streaming_gives_the_whole_text_in_pieces(llama):
    asked = GenerationRequest("the cat", "ann", max_new_tokens=10)
    pieces = list(llama[0].stream(asked))
    whole = llama[0].generate([asked])[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert (pieces[-1].finish_reason, sum(piece.tokens for piece in pieces)) == (whole.finish_reason, len(whole.ids))


def test_a_stop_string_ends_the_text(llama):
    asked = [GenerationRequest(prompt, user, max_new_tokens=10) for prompt in PROMPTS for user in IDS]
    one, whole = max(zip(asked, llama[0].generate(asked), strict=True), key=lambda pair: len(set(pair[1].text.split())))
    word = whole.text.split()[-2]
    cut = llama[0].generate([replace(one, stop=("nothing", word))])[0]
    assert whole.text.index(word) > 0
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens


def test_writing_ends_at_the_last_position_and_needs_room(model_paths):
    writer, _ = make_writer(model_paths["gpt2"])  # of 64 positions, three are the user's and one is BOS
    (written,) = writer.generate([GenerationRequest("a " * 58, "ann", max_new_tokens=9)])
    assert (written.completion_tokens, written.finish_reason) == (2, "length")
    with pytest.raises(ConfigurationError, match="take 64 positions, and this model has 64"):
        Engine(writer).add(GenerationRequest("a " * 60, "ann"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"strength": float("nan")}, "strength is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": 4.5}, "strength is 4.5; it must be 0 or more, and 4 at most"),
        ({"temperature": 2.5}, "temperature is 2.5"),
        ({"seed": 2**53}, "between -2"),
        ({"stop": ("",)}, "none of them empty"),
        ({"user": {"ann": 1.0, "bob": 0.0}}, "share of 'bob' is 0.0"),
        ({"user": {7: 1.0}}, "7 is of type int; ids are strings: '7'"),
        ({"user": 7}, "7 is of type int; ids are strings: '7'"),
        ({"user": {"ann": 1.5, "bob": -0.5}}, "share of 'bob' is -0.5"),
        ({"user": {}}, "a blend is empty"),
    ],
)
def test_what_can_not_be_asked_is_refused(how, says):
    with pytest.raises(ConfigurationError, match=says):
        GenerationRequest("a", **how)


def test_an_empty_conversation_template_is_refused_at_once(llama):
    with pytest.raises(PRLHFError, match="the tokenizer has no chat template"):
        llama[0].generate([GenerationRequest("a"), GenerationRequest([{"role": "user", "content": "a"}])])
