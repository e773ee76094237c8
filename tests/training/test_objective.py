"""The objective against a brute-force float64 reference, TRL, and what must not matter to it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.losses import DPOLoss, SFTLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.types import PreferenceBatch, Tokens
from prlhf_lightning.user_models import (
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    TextUserModel,
    UniformUserModel,
    UserModel,
)

SMALL = LoRA(rank=4)
USERS = ["ann", "bob", "cy"]


def make_module(
    path: str, user_model: UserModel, alpha: float = 0.3, lora: LoRA | None = SMALL, **loss
) -> PersonalizedLM:
    module = PersonalizedLM(user_model, CausalLMPolicy(path, lora=lora), DPOLoss(**{"beta": 0.7, **loss}), alpha=alpha)
    module.vocabulary = UserVocabulary(USERS)
    module.configure_model()
    for name, param in module.named_parameters():
        if "lora_B" in name or any(param is table for table in module.user_model.row_tables()):
            torch.nn.init.normal_(param.data, std=0.1)
    if isinstance(module.user_model, IndividualUserModel):
        module.user_model.offsets.weight.data[0] = 0
    return module


def make_pairs(count: int, with_text: bool = False) -> list[tuple[str, list[int], list[int], list[int], list[int]]]:
    draw = random.Random(0)

    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(4, 24) for _ in range(draw.randint(low, high))]

    return [
        (
            draw.choice([*USERS, "stranger"]),
            words(0, 3) if with_text else [],
            [1, *words(0, 4)],
            [*words(1, 5), 2],
            [*words(1, 5), 2],
        )
        for _ in range(count)
    ]


def make_batch(pairs) -> PreferenceBatch:
    user_ids, *parts = zip(*pairs, strict=True)
    text, prompt, chosen, rejected = (Tokens.from_lists(part) for part in parts)
    return PreferenceBatch(user_ids, text, prompt, chosen, rejected, torch.arange(len(pairs)))


def brute_force_loss(module: PersonalizedLM, pair, alpha: float, beta: float) -> torch.Tensor:
    """P-DPO of one pair, one unpadded row at a time, from full float64 logits and the paper's formula."""
    user_id, text, prompt, chosen, rejected = pair
    row = USERS.index(user_id) + 1 if user_id in USERS else 0
    lm = module.policy.lm
    words = lm.get_input_embeddings()

    def score(vectors: torch.Tensor, completion: list[int]) -> torch.Tensor:
        rows = [words(torch.tensor(prompt[:1])), vectors, words(torch.tensor([*text, *prompt[1:], *completion]))]
        logits = lm(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0].log_softmax(-1)
        start = len(text) + len(prompt) + len(vectors) - 1
        return logits[torch.arange(start, start + len(completion)), completion].sum()

    implicit = module.user_model
    if isinstance(implicit, CompositeUserModel):
        implicit = implicit.parts[0]
    offset = implicit.offsets.weight[row].view(implicit.generic_prompt.shape) if row else 0
    nothing = torch.zeros(0, words.weight.shape[1], dtype=torch.float64)
    with torch.no_grad(), module.policy.model.disable_adapter():
        reference = score(nothing, chosen) - score(nothing, rejected)
    loss = 0
    for weight, vectors in ((alpha, implicit.generic_prompt + offset), (1 - alpha, implicit.generic_prompt)):
        delta = beta * (score(vectors, chosen) - score(vectors, rejected) - reference)
        loss = loss - weight * torch.log(torch.sigmoid(delta))
    return loss


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
@pytest.mark.parametrize("with_text", [False, True])
def test_loss_and_every_gradient_equal_a_float64_reference(model_paths, name, with_text):
    user_model = IndividualUserModel(num_tokens=2)
    if with_text:
        user_model = CompositeUserModel([user_model, TextUserModel()])
    module = make_module(model_paths[name], user_model)
    if with_text:
        module.user_model.parts[0].offsets.weight.data[0] = 0
    pairs = make_pairs(5, with_text)
    reference = copy.deepcopy(module).double()
    losses, _ = module.objective(make_batch(pairs))
    losses.mean().backward()
    expected = torch.stack([brute_force_loss(reference, pair, alpha=0.3, beta=0.7) for pair in pairs])
    expected.mean().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = dict(reference.named_parameters())
    checked = 0
    for parameter_name, param in module.named_parameters():
        if param.requires_grad and param.grad is not None:
            grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
            other = wanted[parameter_name].grad
            other = other.to_dense() if other.is_sparse else other
            torch.testing.assert_close(grad.double(), other, rtol=1e-3, atol=1e-5, msg=parameter_name)
            checked += 1
    assert checked == sum(param.requires_grad for param in module.parameters())


def test_a_pair_weighs_the_same_in_any_batch(model_path):
    module = make_module(model_path, IndividualUserModel(2))
    pairs = make_pairs(6)
    together, _ = module.objective(make_batch(pairs))
    backwards, _ = module.objective(make_batch(pairs[::-1]))
    alone = torch.cat([module.objective(make_batch([pair]))[0] for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, backwards.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 2, 2], [1] * 6])
def test_gradients_do_not_depend_on_the_micro_batches(model_path, sizes):
    def gradients(splits: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        module, pairs = make_module(model_path, IndividualUserModel(2)), make_pairs(6)
        for size in splits:
            batch, pairs = make_batch(pairs[:size]), pairs[size:]
            (module.objective(batch)[0].mean() / len(splits)).backward()
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in module.parameters() if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    torch.testing.assert_close(gradients(sizes), gradients([6]), rtol=1e-3, atol=1e-6)


def test_the_authors_mix_of_group_means_depends_on_the_split(model_path):
    """Their code takes alpha * mean(user rows) + (1 - alpha) * mean(generic rows) of what lies in a micro-batch."""
    module = make_module(model_path, IndividualUserModel(2))
    _, (own, generic) = module.objective(make_batch(make_pairs(2)))
    rows = [(0.3, own.output.losses[0]), (0.3, own.output.losses[1]), *((0.7, x) for x in generic.output.losses)]

    def authors(micro_batch) -> torch.Tensor:
        groups = {weight: [loss for w, loss in micro_batch if w == weight] for weight, _ in micro_batch}
        return sum(weight * torch.stack(losses).mean() for weight, losses in groups.items())

    whole = authors(rows)
    by_row = torch.stack([authors([row]) for row in rows]).mean()
    assert (whole - by_row).abs() > 0.1 * whole
    torch.testing.assert_close(whole, module.objective(make_batch(make_pairs(2)))[0].mean())


def test_alpha_picks_the_terms(model_path):
    module = make_module(model_path, IndividualUserModel(2))
    batch = make_batch(make_pairs(4))
    mixed, (own, generic) = module.objective(batch)
    torch.testing.assert_close(mixed, 0.3 * own.output.losses + 0.7 * generic.output.losses)
    for alpha, term in ((1.0, own), (0.0, generic)):
        module.alpha = alpha
        losses, terms = module.objective(batch)
        torch.testing.assert_close(losses, term.output.losses)
        assert [t.generic for t in terms] == [term.generic]


@pytest.mark.parametrize("with_text", [False, True])
def test_a_drawn_term_is_one_of_two_and_their_mix_on_average(model_path, with_text):
    user_model = CompositeUserModel([IndividualUserModel(2), TextUserModel()]) if with_text else IndividualUserModel(2)
    module = make_module(model_path, user_model)
    batch = make_batch(make_pairs(8, with_text))
    mixed, (own, generic) = module.objective(batch)
    total = 0
    for _ in range(8):
        losses, _ = module.objective(make_batch(make_pairs(8, with_text) * 25), sampled=True)
        losses = losses.detach().view(25, 8)  # drawn row by row
        is_own, is_generic = losses.isclose(own.output.losses, 1e-4), losses.isclose(generic.output.losses, 1e-4)
        assert (is_own | is_generic).all()
        total = total + losses.sum(0)
    gap = (own.output.losses - generic.output.losses).abs()
    assert gap.max() > 0.1  # else the next line could not fail
    assert ((total / 200 - mixed).abs() <= 3.5 * gap * (0.3 * 0.7 / 200) ** 0.5 + 1e-4).all()


def test_a_user_whose_generic_term_was_drawn_gets_no_gradient(model_path):
    module = make_module(model_path, IndividualUserModel(2), alpha=0.0)
    losses, _ = module.objective(make_batch(make_pairs(4)), sampled=True)
    losses.mean().backward()
    assert module.user_model.offsets.weight.grad is None or not module.user_model.offsets.weight.grad.coalesce()._nnz()
    assert module.user_model.generic_prompt.grad.abs().sum() > 0


@pytest.mark.parametrize("user_model", [IndividualUserModel(2), ClusterUserModel(3, 2)], ids=["individual", "cluster"])
def test_an_unseen_user_is_the_generic_user_exactly(model_path, user_model):
    module = make_module(model_path, user_model)
    pairs = make_pairs(4)
    (stranger,) = module.log_probs(make_batch([("nobody", *pair[1:]) for pair in pairs]), [False])
    (generic,) = module.log_probs(make_batch([("ann", *pair[1:]) for pair in pairs]), [True])
    (known,) = module.log_probs(make_batch([("ann", *pair[1:]) for pair in pairs]), [False])
    assert torch.equal(stranger.chosen.tokens, generic.chosen.tokens)
    assert not torch.allclose(known.chosen.tokens, generic.chosen.tokens)


def test_unpersonalized_generic_terms_are_computed_once(model_path):
    module = make_module(model_path, UniformUserModel(num_tokens=2))
    losses, terms = module.objective(make_batch(make_pairs(4)), every_term=True)
    assert len(terms) == 1
    assert torch.equal(losses, terms[0].output.losses)


def test_a_pair_of_several_users_is_scored_once_for_the_generic(model_path, monkeypatch):
    module = make_module(model_path, IndividualUserModel(2))
    one, other = make_pairs(2)
    pairs = [("ann", *one[1:]), ("bob", *other[1:]), ("cy", *one[1:]), ("ann", *one[1:])]
    expected = torch.cat([module.objective(make_batch([pair]))[0] for pair in pairs])
    scored = []
    log_probs = module.policy.log_probs
    monkeypatch.setattr(
        module.policy, "log_probs", lambda prompt, *rest: (scored.append(len(prompt)), log_probs(prompt, *rest))[1]
    )
    losses, _ = module.objective(make_batch(pairs))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert scored == [4 + 2]


def test_the_sft_term_weighs_on_both_terms(model_path):
    pairs = make_pairs(3)
    torch.manual_seed(0)
    plain, terms = make_module(model_path, IndividualUserModel(2)).objective(make_batch(pairs))
    torch.manual_seed(0)
    with_sft, _ = make_module(model_path, IndividualUserModel(2), sft_weight=0.5).objective(make_batch(pairs))
    nll = [-term.log_probs.chosen.mean for term in terms]
    torch.testing.assert_close(with_sft, plain + 0.5 * (0.3 * nll[0] + 0.7 * nll[1]))


def test_supervised_batches_need_no_rejected_completion(model_path):
    module = PersonalizedLM(UniformUserModel(), CausalLMPolicy(model_path, lora=None), SFTLoss())
    module.vocabulary = UserVocabulary(USERS)
    module.configure_model()
    assert module.policy.reference_model is None
    pairs = [(user, text, prompt, chosen, []) for user, text, prompt, chosen, _ in make_pairs(3)]
    losses, (term,) = module.objective(make_batch(pairs))
    torch.testing.assert_close(losses, -term.log_probs.chosen.mean)


def test_with_only_the_generic_user_loss_and_gradients_are_trls(model_path, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    text = [
        {
            "prompt": tokenizer.decode(prompt[1:]),
            "chosen": " " + tokenizer.decode(chosen[:-1]),
            "rejected": " " + tokenizer.decode(rejected[:-1]),
        }
        for _, _, prompt, chosen, rejected in make_pairs(12)
        if len(prompt) > 1
    ][:6]
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_path),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.7, per_device_train_batch_size=len(text), report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))

    # What TRL tokenized is what we score: completion_mask tells prompt from completion.
    rows = []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        real = attention.bool()
        rows.append((ids[real & ~completion.bool()].tolist(), ids[real & completion.bool()].tolist()))
    half = len(rows) // 2
    pairs = [("ann", [], p, c, r) for (p, c), (_, r) in zip(rows[:half], rows[half:], strict=True)]
    module = make_module(model_path, UniformUserModel(num_tokens=0), alpha=1.0, lora=None)
    # A policy that has moved away from its reference.
    for param, twin in zip(module.policy.lm.parameters(), trainer.model.parameters(), strict=True):
        noise = 0.05 * torch.randn_like(param)
        param.data += noise
        twin.data += noise
    expected = trainer.compute_loss(trainer.model, batch)
    losses, _ = module.objective(make_batch(pairs))
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    losses.mean().backward()
    for param, twin in zip(module.policy.lm.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(param.grad, twin.grad, rtol=1e-3, atol=1e-6)


def test_a_mixture_of_experts_adds_its_balancing_loss_to_pairs(tmp_path):
    config = MixtralConfig(
        vocab_size=25, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    module, batch = make_module(str(tmp_path), UniformUserModel(num_tokens=0)), make_batch(make_pairs(4))
    losses, (term,) = module.objective(batch)
    rows = [
        [*prompt, *answer]
        for answers in (batch.chosen, batch.rejected)
        for prompt, answer in zip(
            *([row.tolist() for row in part.unpadded()] for part in (batch.prompt, answers)), strict=True
        )
    ]
    tokens = Tokens.from_lists(rows)
    output = module.policy.lm(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_router_logits=True)
    torch.testing.assert_close(losses - term.output.losses, (0.5 * output.aux_loss).expand(4))
    torch.testing.assert_close(module.eval().objective(batch)[0], term.output.losses)


@pytest.mark.parametrize("reads_text", [False, True])
def test_sharing_texts_changes_no_value_and_no_gradient(model_path, reads_text, monkeypatch):
    user_model: UserModel = IndividualUserModel(num_tokens=3)
    if reads_text:
        user_model = CompositeUserModel([user_model, TextUserModel()])
    pairs = make_pairs(4, with_text=True)
    # The user of the first pair ranked five answers to its prompt, and two users share an answer.
    user, about, prompt, *_ = pairs[0]
    answers = [[5 + n, 6, 2] for n in range(4)]
    pairs += [(user, about, prompt, a, b) for a in answers for b in answers if a < b] + [
        ("stranger", about, prompt, answers[0], answers[1])
    ]
    batch = make_batch(pairs)
    module = make_module(model_path, user_model)
    generic = torch.arange(len(pairs)) % 3 == 0
    found = []
    for least in (0.0, 2.0):  # always, and never
        monkeypatch.setattr("prlhf_lightning.model._MIN_SAVED", least)
        scored = [*module.log_probs(batch, (False, True)), module.log_probs_under_either(batch, generic)]
        sums = torch.stack([part.sum for pair in scored for part in (pair.chosen, pair.rejected)])
        module.zero_grad()
        (sums * torch.linspace(-1, 2, len(pairs))).sum().backward()
        grads = [p.grad.to_dense() for p in module.parameters() if p.grad is not None]
        found.append((sums.detach(), torch.cat([grad.flatten() for grad in grads])))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)  # sums of many float32 numbers


def test_shared_texts_are_computed_once(model_path):
    module = make_module(model_path, IndividualUserModel(num_tokens=3))
    answers = [[5 + n, 6, 2] for n in range(4)]
    batch = make_batch([("ann", [], [1, 4, 5, 6, 7], a, b) for a in answers for b in answers if a < b])
    positions = []

    def count(_module, args, kwargs):
        positions.append(kwargs["inputs_embeds"].shape[:2].numel())

    module.policy.lm.base_model.register_forward_pre_hook(count, with_kwargs=True)
    module.log_probs(batch)
    assert positions == [8, 4 * 2]  # one prompt with three vectors; of each answer, all but the last token
