"""All that computes with a model, on a GPU: a pretended one everywhere, and a real one where there is one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_thumbs, write_votes
from devices import GPU, OtherDeviceError, PretendedGPU, on_gpu
from lightning.pytorch import Callback
from quiet_trainer import quiet_trainer

from prlhf_lightning import losses
from prlhf_lightning.adaptation import adapt_users, cold_start, encode_users, fit_shrinkage, suggest
from prlhf_lightning.cli.adapt import _table, read_pairs
from prlhf_lightning.cli.serve import NewUsers
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.data.batching import collate
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.losses import DPOLoss, KTOLoss, PreferenceLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks import CollapseMonitor
from prlhf_lightning.training.callbacks.outputs import UserTable
from prlhf_lightning.user_models import (
    AmortizedUserModel,
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UserModel,
)

USER_MODELS = {
    "amortized": lambda: AmortizedUserModel(2, 2, 3),
    "all others": lambda: CompositeUserModel(
        [IndividualUserModel(1), LowRankUserModel(1, 2), ClusterUserModel(2, 1), TextUserModel()]
    ),
}
REAL = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["pretended", pytest.param("real", marks=REAL)])
def place(request):
    """Arguments of a Trainer that trains on a GPU."""
    if request.param == "real":
        yield {"accelerator": "gpu", "devices": 1}
        return
    with PretendedGPU():
        yield on_gpu()


def make(model_path, user_model: UserModel | None = None, loss: PreferenceLoss | None = None, **how) -> PersonalizedLM:
    policy = CausalLMPolicy(model_path, **{"lora": LoRA(rank=2), **how.pop("policy", {})})
    optim = Optim(lr=1e-2, user_lr=1e-1, user_weight_decay=0.1, warmup_steps=0)
    sampling = Sampling(max_new_tokens=2, temperature=0.0)
    user_model = user_model or IndividualUserModel(2)
    return PersonalizedLM(user_model, policy, loss or DPOLoss(), optim=optim, sampling=sampling, **how)


def make_data(module, file, **how) -> PreferenceDataModule:
    what = {"feedback": module.loss.feedback, "history_size": module.user_model.history_size}
    options = {"batch_size": 4, "validation_fraction": 0.2, "unseen_user_fraction": 0.25, **what, **how}
    return PreferenceDataModule(FileSource(str(file)), tokenizer=module.policy.name, **options)


def make_trainer(tmp_path, place, **how):
    return quiet_trainer(tmp_path, **{"max_epochs": 1, "gradient_clip_val": 1.0, **place, **how})


def trained(model_path, votes, tmp_path, place, user_model: UserModel | None = None) -> PersonalizedLM:
    module = make(model_path, user_model)
    data = make_data(module, votes)
    make_trainer(tmp_path, place, limit_train_batches=2, limit_val_batches=0).fit(module, data)
    return module.eval().to(GPU)


def without_texts(file: Path) -> Path:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name != "user_text"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


@pytest.mark.parametrize("name", USER_MODELS)
def test_models_train_validate_and_write_on_a_gpu(model_path, votes, tmp_path, place, name):
    module = make(model_path, USER_MODELS[name]())
    data = make_data(module, votes)
    monitor = CollapseMonitor(prompts=2, max_new_tokens=2)
    trainer = make_trainer(tmp_path, place, max_epochs=2, limit_train_batches=2, callbacks=[monitor, UserTable()])
    trainer.fit(module, data)
    assert {"val/seen/accuracy", "val/unseen/accuracy", "val/generated_empty"} <= trainer.callback_metrics.keys()
    trainer.predict(module, data)


LOSSES = [getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")]


def test_every_loss_is_computed_on_a_gpu(model_path, votes, tmp_path, place):
    module = trained(model_path, votes, tmp_path, place).train()
    no, one, two = ([], [5, 6, 2], [7, 2])
    pairs, thumbs = (
        collate([{"user_id": user, "record": 0, "user_text_ids": no, "prompt_ids": [1, 4]} | row for user, row in rows])
        for rows in (
            [(user, {"chosen_ids": one, "rejected_ids": two}) for user in ("ann", "bob", "new")],
            [("ann", {"chosen_ids": one, "rejected_ids": no}), ("bob", {"chosen_ids": no, "rejected_ids": two})],
        )
    )
    for loss in (one for one in LOSSES if issubclass(one, losses.PreferenceLoss) and not one.__abstractmethods__):
        module.loss = loss().to(GPU)
        rows, _ = module.objective((thumbs if loss.feedback == "thumbs" else pairs).to(GPU))
        rows.sum().backward()
        assert rows.device == GPU, loss


OTHERS = {
    "drawn terms": {"sample_terms": True},
    "one term": {"alpha": 0.0},
    "all weights": {"policy": {"lora": None}},
    # Without adapters, whose operation, recomputed in the backward pass, does not see what is pretended.
    "recomputed layers": {"policy": {"gradient_checkpointing": True, "lora": None}},
    "bfloat16, adapters and tables in float32": {"policy": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS)
def test_other_settings_train_on_a_gpu(model_path, votes, tmp_path, place, how):
    module = make(model_path, **how)
    data = make_data(module, votes)
    make_trainer(tmp_path, place, limit_train_batches=2, limit_val_batches=0).fit(module, data)


def test_validation_after_a_fit_that_left_the_model_on_the_host(model_path, votes, tmp_path, place):
    module = make(model_path)
    data = make_data(module, without_texts(votes))  # with texts, that nothing reads, rows' lengths are not looked at
    trainer = make_trainer(tmp_path, place, limit_train_batches=1)
    trainer.fit(module, data)
    assert module.user_model.offsets.weight.device.type == "cpu"
    assert trainer.validate(module, data, verbose=False)


def test_random_weights_are_the_same_on_a_gpu_as_on_the_host(model_path, place):
    def build() -> CausalLMPolicy:
        policy = CausalLMPolicy(model_path, lora=None, random_init=3)
        policy.build()
        return policy

    with GPU:
        there = build()
    here = build()
    assert there.lm.device == GPU
    assert there.reference_identity()["weights"] == here.reference_identity()["weights"]
    for name, weight in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), weight), name
    with GPU:
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        build()
        assert torch.equal(torch.rand(2), expected)  # chance goes on as if nothing had been drawn


def test_users_are_learned_on_a_gpu_from_pairs_on_any_device(model_path, votes, tmp_path, place):
    module = trained(model_path, votes, tmp_path, place)
    new = FileSource(str(write_votes(tmp_path / "new.jsonl", {"eve": 5, "fay": 4}, seed=5)))
    pairs = read_pairs(module, new)[0]
    for here in (pairs, pairs.to(GPU)):
        adapted = adapt_users(module, here, ["eve", "fay", "nobody"], steps=1)
        assert adapted.std.device == adapted.left_out().device == GPU
        suggest(module, adapted, here, 2)
        cold_start(module, here, here, (0, 2), prior=adapted.prior, steps=1)
        _table(adapted)
    fit_shrinkage(module, replace(pairs, user_ids=("ann",) * len(pairs)), factors=(0.0, 1.0))


def test_users_are_read_off_their_pairs_on_a_gpu(model_path, votes, tmp_path, place):
    module = trained(model_path, votes, tmp_path, place, AmortizedUserModel(2, 2, 3))
    pairs = read_pairs(module, FileSource(str(votes)))[0]
    assert encode_users(module, pairs).rows.device == GPU


def test_writing_for_users_blends_and_new_ones_on_a_gpu(model_path, votes, tmp_path, place):
    module = trained(model_path, votes, tmp_path, place)
    writer = Generator(module.policy.lm, module.policy.tokenizer, module.user_model, module.vocabulary)
    NewUsers(module, writer)("eve", [json.loads(line) for line in votes.open()][:6])
    users, how = ("eve", None, {"ann": 0.5, "bob": 0.5}), ({}, {"temperature": 1.0, "top_p": 0.8, "seed": 1})
    asked = [
        GenerationRequest("the cat", user, strength=strength, max_new_tokens=2 + len(more), **more)
        for user in users
        for strength in (0.0, 2.0)
        for more in how
    ]
    assert len(writer.generate(asked, max_batch_rows=5)) == len(asked)
    module.generate(["the cat"], ["ann"], sampling=Sampling(max_new_tokens=2, top_p=0.9))


class WaitsOfSteps(Callback):
    """Tells the waits of each training step, its batch included, from those of the others."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self._gpu, self._before = gpu, Counter()
        self.steps: list[Counter[str]] = []

    def on_train_batch_end(self, *args) -> None:
        self.steps.append(self._gpu.waits - self._before)
        self._before = Counter(self._gpu.waits)


# Of these Lightning causes two, by reading what the progress bar shows, and transformers one in each pass.
@pytest.mark.parametrize(
    ("how", "most"), [({}, 13), ({"sample_terms": True}, 11), ({"loss": KTOLoss}, 25)], ids=["both", "drawn", "kto"]
)
def test_the_host_waits_for_the_gpu_no_oftener_than_it_must(model_path, votes, tmp_path, how, most):
    file = write_thumbs(tmp_path / "thumbs.jsonl", votes) if "loss" in how else votes
    with PretendedGPU() as gpu:
        waits = WaitsOfSteps(gpu)
        module = make(model_path, loss=how["loss"]() if "loss" in how else None, sample_terms="sample_terms" in how)
        data = make_data(module, file, batch_size=13, unseen_user_fraction=0.0)
        make_trainer(tmp_path, on_gpu(), max_epochs=2, limit_val_batches=0, callbacks=[waits]).fit(module, data)
    assert len(waits.steps) == 6
    assert waits.steps[4].total() <= most, waits.steps[4]  # in the second epoch, which the reference is cached for


def test_the_pretended_gpu_refuses_like_one_and_counts_waits():
    with PretendedGPU() as gpu:
        there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
        for mixes in (
            lambda: there + here,
            lambda: torch.stack([there, here]),
            lambda: here[there.long()],
            lambda: here.add_(there.sum()),
        ):
            with pytest.raises(OtherDeviceError):
                mixes()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not gpu.waits
        assert (there * here[1]).device == there[here.long()].device == there.view(2, 2).to(here).sum().to(GPU).device
        assert gpu.waits.total() == 3  # the indices and the two copies
        assert there.sum().item() == sum(there[there > 1].tolist()) + 1
        assert gpu.waits.total() == 6
        with GPU:
            assert torch.nn.Linear(2, 2).weight.is_cuda
        table = torch.nn.Embedding(4, 2, sparse=True).to(GPU)
        table(there.long()).sum().backward()
        assert table.weight.grad.coalesce().values().device == GPU
