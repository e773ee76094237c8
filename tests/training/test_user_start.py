"""How a fit starts with users' codes."""

from __future__ import annotations

import json

import pytest
import torch
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.user_start import code_effect, codes_from, scale_directions
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import ClusterUserModel, CompositeUserModel, LowRankUserModel, UserModel


@pytest.fixture
def split_crowd(tmp_path):
    """Half of 20 users prefer the cat, half the dog."""
    path = tmp_path / "crowd.jsonl"
    rows = [
        {"user_id": f"u{user:02}", "prompt": f"the {who}", "chosen": texts[0], "rejected": texts[1]}
        for user in range(20)
        for who in ("red", "blue", "sun", "moon", "slow", "fast")
        for texts in [("cat", "dog") if user % 2 else ("dog", "cat")]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fitted(model_path, votes, folder, user_model: UserModel, ckpt_path=None, **settings) -> PersonalizedLM:
    torch.manual_seed(0)
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2))
    module = PersonalizedLM(user_model, policy, DPOLoss(), optim=Optim(lr=1e-3, user_lr=1e-2, warmup_steps=0))
    data = {"batch_size": 8, "validation_fraction": 0.0, **settings}
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(module, PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, **data), ckpt_path=ckpt_path)
    return module


def codes_of(module: PersonalizedLM) -> torch.Tensor:
    return module.user_model.codes.weight.detach()


def test_training_leaves_the_codes_that_were_estimated(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2))
    data = module.trainer.datamodule
    assert torch.equal(codes_of(module)[1:], codes_from(data, module.vocabulary, 2).mean)
    signs = codes_of(module)[1:, 0].sign()
    assert signs[0] != signs[1]
    assert torch.equal(signs[::2], signs[0].expand(10))
    assert torch.equal(signs[1::2], signs[1].expand(10))
    assert torch.equal(codes_of(module)[0], torch.zeros(2))


def test_without_the_estimate_codes_are_trained_from_zero(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2, estimate_codes=False))
    assert module.user_model.spread is None
    assert codes_of(module)[1:].abs().amin() > 0
    assert codes_of(module).abs().amax() < 0.5  # a few steps


def test_codes_of_streamed_rows_are_trained(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2), streaming=True)
    assert module.user_model.spread is None
    assert codes_of(module)[1:].abs().amax() > 0


def test_a_composite_gives_its_parts_their_codes(model_path, split_crowd, tmp_path):
    parts = CompositeUserModel([LowRankUserModel(1, 1), ClusterUserModel(2, 1), LowRankUserModel(1, 2)])
    module = fitted(model_path, split_crowd, tmp_path, parts)
    first, _, last = module.user_model.parts
    assert torch.equal(first.codes.weight, last.codes.weight[:, :1])


def test_a_resumed_fit_keeps_codes_and_uncertainty(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path / "a", LowRankUserModel(2, 2))
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = fitted(model_path, split_crowd, tmp_path / "b", LowRankUserModel(2, 2), ckpt_path=tmp_path / "a.ckpt")
    for (name, a), b in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name  # its epoch was over
    assert torch.equal(resumed.user_model.spread, module.user_model.spread)


def test_codes_that_were_not_estimated_are_trained_further(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2, estimate_codes=False))
    codes = codes_from(module.trainer.datamodule, module.vocabulary, 2)
    module.user_model.start_fit(torch.ones(21), codes, is_fresh=False)
    assert module.user_model.spread is None


def test_a_second_fit_of_a_module_keeps_what_the_first_learned(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2))
    module.user_model.basis.data *= 2
    basis, data = module.user_model.basis.detach().clone(), module.trainer.datamodule
    quiet_trainer(tmp_path, max_epochs=0).fit(module, data)
    assert torch.equal(module.user_model.basis, basis)


def test_a_later_training_on_other_data_does_not_replace_codes(model_path, split_crowd, tmp_path):
    module = fitted(model_path, split_crowd, tmp_path / "a", LowRankUserModel(2, 2))
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    later = PersonalizedLM(
        LowRankUserModel(2, 2), CausalLMPolicy(model_path, lora=LoRA(rank=2)), DPOLoss(), optim=Optim(table_lr=1e-6)
    )
    later.start_from(tmp_path / "a.ckpt")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"user_id": "u00", "prompt": "the sun", "chosen": "cat", "rejected": "dog"}) + "\n")
    data = PreferenceDataModule(FileSource(str(other)), tokenizer=model_path, validation_fraction=0.0)
    quiet_trainer(tmp_path / "b", max_epochs=1).fit(later, data)
    torch.testing.assert_close(codes_of(later), codes_of(module), atol=1e-5, rtol=0)
    assert later.user_model.spread is None


# ---- the size of the directions


def started(model_path, votes, tmp_path) -> tuple[PersonalizedLM, object]:
    module = fitted(model_path, votes, tmp_path, LowRankUserModel(2, 3))
    return module, module.trainer.datamodule.training_sample(16)


def test_the_effect_of_codes_is_that_of_finite_differences(model_path, split_crowd, tmp_path):
    module, batch = started(model_path, split_crowd, tmp_path)
    module.eval().double()
    table, squares = module.user_model.codes.weight, 0.0
    with torch.no_grad():
        for number in range(3):
            margins = []
            for step in (1e-4, -1e-4):
                table.zero_()
                table[1:, number] = step
                chosen, rejected = module.rewards(batch)
                margins.append(chosen - rejected)
            squares = squares + ((margins[0] - margins[1]) / 2e-4).square()
    assert code_effect(module, batch) == pytest.approx(float(squares.mean()), rel=0.01)


def test_directions_are_scaled_to_the_wanted_effect(model_path, split_crowd, tmp_path):
    module, batch = started(model_path, split_crowd, tmp_path)
    scale_directions(module, batch)
    assert code_effect(module, batch) == pytest.approx(0.35, rel=0.3)  # margins are not quite linear


# ---- uncertainty and prior


def low_rank(num_rows: int = 4) -> LowRankUserModel:
    model = LowRankUserModel(2, 3)
    model.build(num_rows, torch.randn(10, 4))
    torch.nn.init.normal_(model.codes.weight[1:].detach())
    return model


def test_only_training_adds_noise_and_never_to_the_generic_user():
    model = low_rank()
    model.spread = torch.full((4, 3), 0.5)
    model.spread[0] = 0
    rows = Users(torch.tensor([0, 1]))
    one, other = model(rows).vectors, model(rows).vectors
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1])
    model.eval()
    assert torch.equal(model(rows).vectors, model(rows).vectors)


def test_uncertainty_has_the_size_that_was_estimated():
    torch.manual_seed(0)
    model = low_rank(2)
    model.spread = torch.tensor([[0.0] * 3, [0.1, 0.5, 1.0]])
    many = Users(torch.ones(20_000, dtype=torch.long))
    offsets = (model(many).vectors - model.generic_prompt).flatten(1)
    codes = torch.linalg.lstsq(model.basis.T, offsets.T).solution.T
    torch.testing.assert_close(codes.std(0), torch.tensor([0.1, 0.5, 1.0]), rtol=0.03, atol=0)
    torch.testing.assert_close(codes.mean(0), model.codes.weight[1], atol=0.03, rtol=0)


def test_the_penalties_of_a_users_pairs_add_up_to_one_prior():
    model = low_rank()
    model.pairs = torch.tensor([0.0, 3, 1, 2])
    penalty = model.penalty(Users(torch.tensor([1, 1, 1, 2, 3, 3])))
    total = -torch.distributions.Normal(0, 1).log_prob(model.codes.weight[1:].double()).sum()
    constant = 9 * 0.5 * torch.log(torch.tensor(2 * torch.pi)).double()
    torch.testing.assert_close(penalty.double().sum(), total - constant, rtol=1e-5, atol=0)


def test_evaluation_and_estimated_codes_have_no_penalty():
    model = low_rank()
    model.pairs = torch.ones(4)
    assert model.eval().penalty(Users(torch.tensor([1]))) is None
    model.train().spread = torch.zeros(4, 3)
    assert model.penalty(Users(torch.tensor([1]))) is None


# ---- what new users are adapted with


@pytest.mark.parametrize("estimate_codes", [True, False])
def test_only_estimated_codes_have_a_known_prior(model_path, split_crowd, tmp_path, estimate_codes):
    module = fitted(model_path, split_crowd, tmp_path, LowRankUserModel(2, 2, estimate_codes=estimate_codes))
    assert module.user_model.has_unit_prior == estimate_codes
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PersonalizedLM.load_from_checkpoint(
        tmp_path / "a.ckpt",
        user_model=LowRankUserModel(2, 2),
        policy=CausalLMPolicy(model_path, lora=LoRA(rank=2)),
        loss=DPOLoss(),
    )
    assert loaded.user_model.has_unit_prior == estimate_codes


def test_weights_of_older_versions_have_no_known_prior():
    model = low_rank()
    older = {name: weight for name, weight in model.state_dict().items() if name != "estimated"}
    model.estimated.fill_(True)
    model.load_state_dict(older)
    assert not model.has_unit_prior
