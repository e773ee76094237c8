"""What a Trainer does with the module: who moves, what a checkpoint holds, what comes back from it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from interrupted_runs import Crash
from lightning.pytorch import Callback, Trainer
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from prlhf_lightning.data import FileSource, PreferenceDataModule, UserVocabulary
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BCOLoss, DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.types import Tokens
from prlhf_lightning.user_models import (
    AmortizedUserModel,
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UniformUserModel,
)

USER_MODELS = {
    "uniform": lambda: UniformUserModel(2),
    "individual": lambda: IndividualUserModel(2),
    "cluster": lambda: ClusterUserModel(2, 2),
    "low rank": lambda: LowRankUserModel(2, 2),
    "amortized": lambda: AmortizedUserModel(2, 2, 3),
    "text": TextUserModel,
    "composite": lambda: CompositeUserModel([ClusterUserModel(2, 1), TextUserModel()]),
}


def make(model_path, user_model=None, loss=None, **kwargs) -> PersonalizedLM:
    return PersonalizedLM(
        user_model or IndividualUserModel(2),
        CausalLMPolicy(model_path, lora=kwargs.pop("lora", LoRA(rank=2))),
        loss or DPOLoss(),
        optim=Optim(lr=1e-2, user_lr=1e-1, user_weight_decay=0.1, warmup_steps=0),
        sampling=Sampling(max_new_tokens=4, temperature=0.0),
        **kwargs,
    )


def make_data(votes, model_path, **kwargs) -> PreferenceDataModule:
    options = {"batch_size": 4, "validation_fraction": 0.2, **kwargs}
    return PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, **options)


def make_trainer(tmp_path, **kwargs) -> Trainer:
    return quiet_trainer(tmp_path, **{"max_epochs": 1, "gradient_clip_val": 1.0, "log_every_n_steps": 1, **kwargs})


@pytest.mark.parametrize("name", USER_MODELS)
@pytest.mark.parametrize("make_loss", [DPOLoss, BCOLoss])
def test_every_user_model_trains_and_reloads_from_a_checkpoint(model_path, votes, tmp_path, name, make_loss):
    module = make(model_path, USER_MODELS[name](), make_loss())
    data = make_data(votes, model_path, history_size=module.user_model.history_size)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PersonalizedLM.load_from_checkpoint(
        tmp_path / "a.ckpt",
        user_model=USER_MODELS[name](),
        policy=CausalLMPolicy(model_path, lora=LoRA(rank=2)),
        loss=make_loss(),
    )
    assert loaded.optim == module.optim
    assert loaded.vocabulary == module.vocabulary
    batch = next(iter(data.val_dataloader()[0]))
    for generic in (False, True):
        (before,), (after,) = (m.eval().log_probs(batch, [generic]) for m in (module, loaded))
        assert torch.equal(before.chosen.tokens, after.chosen.tokens)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)  # opens without running anybody's code
    assert not any("base_layer" in key or "embed_tokens" in key for key in state["state_dict"])


def test_a_user_who_is_not_in_the_data_yet_does_not_move(model_path, votes, tmp_path):
    module, data = make(model_path), make_data(votes, model_path)
    module.vocabulary = UserVocabulary(["ann", "bob", "cy", "dee", "elsewhere"])
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    offsets = module.user_model.offsets.weight
    assert torch.equal(offsets[5], torch.zeros_like(offsets[5]))
    assert torch.equal(offsets[0], torch.zeros_like(offsets[0]))  # nor does the generic user's offset
    assert all(offsets[row].abs().sum() > 0 for row in range(1, 5))


def test_training_changes_nothing_in_the_reference(model_path, votes, tmp_path):
    module, data = make(model_path), make_data(votes, model_path)
    trainer = make_trainer(tmp_path)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    module.vocabulary = data.vocabulary
    module.configure_model()
    before = module.reference_log_probs(batch).chosen.tokens
    trainer.fit(module, data)
    assert torch.equal(module.reference_log_probs(batch).chosen.tokens, before)


def test_full_fine_tuning_trains_and_saves_all_weights(model_path, votes, tmp_path):
    module, data = make(model_path, lora=None), make_data(votes, model_path)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "policy.model.model.embed_tokens.weight" in state
    assert not any("reference_model" in key for key in state)


# Within the first epoch of ten steps, at its end, within the second.
@pytest.mark.parametrize(
    ("step", "name"),
    [(3, "individual"), (10, "individual"), (13, "individual"), (13, "amortized"), (13, "low rank")],
)
def test_a_run_that_crashed_goes_on_to_the_same_weights(model_path, votes, tmp_path, step, name):
    def run(folder, *callbacks: Callback, checkpoint=None) -> PersonalizedLM:
        torch.manual_seed(0)
        module = make(model_path, USER_MODELS[name]())
        data = make_data(votes, model_path, history_size=module.user_model.history_size)
        trainer = make_trainer(folder, max_epochs=2, limit_val_batches=0, callbacks=[SaveOnInterrupt(), *callbacks])
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == 20
        return module

    straight = run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "crashed", Crash(step))
    resumed = run(tmp_path / "resumed", checkpoint=tmp_path / "crashed/checkpoints/interrupted.ckpt")
    for (weight, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), weight


def test_a_checkpoint_of_another_model_is_refused(model_path, votes, tmp_path):
    module, data = make(model_path), make_data(votes, model_path)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="does not fit this model"):
        PersonalizedLM.load_from_checkpoint(
            tmp_path / "a.ckpt",
            user_model=ClusterUserModel(2, 2),
            policy=CausalLMPolicy(model_path, lora=LoRA(rank=2)),
            loss=DPOLoss(),
        )
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "b.ckpt")
    with pytest.raises(ConfigurationError, match="holds no users"):
        PersonalizedLM.load_from_checkpoint(
            tmp_path / "b.ckpt", user_model=TextUserModel(), policy=CausalLMPolicy(model_path), loss=DPOLoss()
        )


@pytest.mark.parametrize(
    ("user_model", "rank", "says"),
    [
        (
            IndividualUserModel(3),
            2,
            ["num_tokens", r"offsets.weight is \[5, 64\] there and \[5, 96\] here"],
        ),
        (IndividualUserModel(2), 4, [r"another policy.lora.rank \(2 in the checkpoint, 4 in this model\)", "lora_A"]),
        (IndividualUserModel(3), 4, ["num_tokens", r"offsets.weight is \[5, 64\] there"]),
    ],
    ids=["num_tokens", "rank", "both"],
)
def test_a_checkpoint_of_other_sizes_is_refused_by_setting(model_path, votes, tmp_path, user_model, rank, says):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make(model_path), make_data(votes, model_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=rank))
    with pytest.raises(ConfigurationError) as error:
        PersonalizedLM.load_from_checkpoint(tmp_path / "a.ckpt", user_model=user_model, policy=policy, loss=DPOLoss())
    assert all(re.search(words, str(error.value)) for words in says), error.value
    assert len(str(error.value)) < 1000


def test_weights_of_another_number_of_users_are_refused(model_path):
    def built(users: list[str], clusters: int) -> PersonalizedLM:
        module = make(model_path, ClusterUserModel(clusters, 2))
        module.vocabulary = UserVocabulary(users)
        module.configure_model()
        return module

    weights = built(["ann", "bob"], 2).state_dict()
    with pytest.raises(ConfigurationError, match="num_clusters"):
        built(["ann", "bob"], 3).load_state_dict(weights)
    says = r"another number of users \(2 in the checkpoint, 3 in this model\).*weights.weight is \[3, 2\] there"
    with pytest.raises(ConfigurationError, match=says):
        built(["ann", "bob", "cy"], 2).load_state_dict(weights)


def test_users_new_to_a_checkpoint_get_the_generic_user(model_path, votes, tmp_path):
    from conftest import write_votes

    module = make(model_path)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data(votes, model_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    more = write_votes(tmp_path / "more.jsonl", {"ann": 9, "zoe": 9})
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="knows 4 users.* 1 of the data's 2 training users are not among them"):
        trainer.validate(fresh := make(model_path), make_data(more, model_path), ckpt_path=tmp_path / "a.ckpt")
    assert fresh.vocabulary.rows(["zoe", "ann"]).tolist() == [0, 1]


def test_predict_writes_for_each_user(model_path, votes, tmp_path):
    module, data = make(model_path), make_data(votes, model_path)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    (first, *_) = trainer.predict(module, data)
    assert {"user_id", "prompt", "completion"} == set(first[0])
    assert first[0]["user_id"] in {"ann", "bob", "cy", "dee"}


@pytest.mark.parametrize("torch_compile", [False, True])
def test_that_compiling_takes_minutes_is_told_before_it_begins(
    model_path, votes, tmp_path, caplog, monkeypatch, torch_compile
):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # which would take minutes
    module = make(model_path)
    module.policy.torch_compile = torch_compile
    make_trainer(tmp_path, max_steps=1).fit(module, make_data(votes, model_path))
    assert any("the first steps compile the model" in said for said in caplog.messages) == torch_compile


def test_texts_are_answered_as_the_ids_the_data_makes_of_them(model_path, votes, tmp_path):
    module, data = make(model_path, TextUserModel()), make_data(votes, model_path, max_prompt_length=3)
    make_trainer(tmp_path).fit(module, data)
    asked, users = ["a cat ran fast", "the dog"], ["ann", "bob"]
    ids = data.encode_prompts(asked)
    assert ids.ids.shape[1] == 3
    assert module.generate(asked, users) == module.generate(ids, users) != module.generate(["red", "blue"], users)
    about = Tokens.from_lists(FeedbackTokenizer(module.policy.tokenizer, data.settings).user_texts(["user likes", ""]))
    assert module.generate(asked, users, ["user likes", ""]) == module.generate(ids, users, about)
    with pytest.raises(ConfigurationError, match=r"prompt is a string; .* such as \['the dog'\]"):
        module.generate("the dog", ["bob"])
    with pytest.raises(ConfigurationError, match="There are 2 prompts for 1 users"):
        module.generate(asked, ["bob"])


def test_metrics_cover_pairs_users_and_the_generic_user(model_path, votes, tmp_path):
    module = make(model_path)
    data = make_data(votes, model_path, unseen_user_fraction=0.4)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert {f"val/seen/{key}" for key in ("loss", "accuracy", "accuracy_user_mean", "accuracy_worst_decile", "margin",
            "generic_accuracy")} <= set(logged)  # fmt: skip
    assert "val/unseen/accuracy" in logged
    table = module.user_table("seen")
    pairs = sum(row.pairs for _, row in table)
    weighted = sum(row.accuracy * row.pairs for _, row in table) / pairs
    assert float(logged["val/seen/accuracy"]) == pytest.approx(weighted)
    assert {user for user, _ in table} <= set(module.vocabulary.ids)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions_train(model_path, votes, tmp_path, precision):
    module = make(model_path)
    make_trainer(tmp_path, precision=precision, max_steps=3).fit(module, make_data(votes, model_path))
    assert all(param.isfinite().all() for param in module.parameters())
    assert module.user_model.offsets.weight.any()


def test_alpha_outside_the_unit_interval_is_refused(model_path):
    with pytest.raises(ConfigurationError, match=r"model.alpha is 1.5"):
        make(model_path, alpha=1.5)


def test_a_batch_without_rows_is_evaluated_to_nothing(model_path, votes, tmp_path):
    """A process gets one that has no rows of a small set: without a batch it would not wait for the others."""
    module, data = make(model_path), make_data(votes, model_path)
    expected = make_trainer(tmp_path).validate(module, data)
    (loader,) = data.val_dataloader()
    batches = [[], *loader.batch_sampler]
    data.val_dataloader = lambda: [DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)]
    assert make_trainer(tmp_path).validate(module, data) == expected
    assert module.predict_step(collate([]), 0) == []


class ShortPolicy(CausalLMPolicy):
    max_positions = 12


@pytest.mark.parametrize(("num_tokens", "fits"), [(3, True), (4, False)])
def test_rows_too_long_for_the_policy_are_refused_at_start(model_path, votes, tmp_path, num_tokens, fits):
    user_model = CompositeUserModel([IndividualUserModel(num_tokens), TextUserModel()])
    module = PersonalizedLM(user_model, ShortPolicy(model_path, lora=LoRA(rank=2)), DPOLoss())
    data = make_data(votes, model_path, max_user_text_length=1, max_completion_length=4)
    data.prepare_data()
    assert data.longest_row == 9  # a word of text, BOS and three words, four of a completion
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    if fits:
        trainer.fit(module, data)
    else:
        says = "The longest row has 9 tokens.*vectors 13; the policy has 12 positions. Lower data.max_prompt_length"
        with pytest.raises(ConfigurationError, match=says):
            trainer.fit(module, data)
        assert trainer.global_step == 0


def test_a_user_model_that_reads_texts_says_when_there_are_none(model_path, votes, tmp_path):
    without = tmp_path / "without.jsonl"
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    without.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "user_text"}) + "\n" for row in rows))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="TextUserModel reads texts about users, and no row has one"):
        trainer.fit(make(model_path, TextUserModel()), make_data(without, model_path))


def test_a_negative_limit_of_the_gradients_is_refused(model_path, votes, tmp_path):
    with pytest.raises(ConfigurationError, match=r"trainer.gradient_clip_val is -1.0; it must be above 0"):
        make_trainer(tmp_path, gradient_clip_val=-1.0).fit(make(model_path), make_data(votes, model_path))


class Gradients(Callback):
    """Keeps the gradient of each step, before it is clipped."""

    def __init__(self) -> None:
        self.of_steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        grads = {name: param.grad for name, param in module.named_parameters() if param.grad is not None}
        self.of_steps.append({name: grad.to_dense().clone() for name, grad in grads.items()})


@pytest.mark.parametrize("budget", [None, 100], ids=["short last batch", "token budget"])
def test_every_pair_of_accumulated_batches_weighs_the_same(model_path, votes, tmp_path, budget):
    options = {"batch_size": 5, "max_tokens_per_batch": budget}
    data = make_data(votes, model_path, **options)
    steps = data._training_batches(0, 1).steps(0)  # 38 pairs
    assert len({len(step) for step in steps[-2:]}) > 1 or budget
    watch = Gradients()
    # Weights that hardly move, so that the gradient of each step can be computed afterwards.
    module = make(model_path, loss=DPOLoss(beta=1.0))
    module.optim = Optim(lr=1e-12, user_lr=1e-12, warmup_steps=0)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[watch])
    trainer.fit(module, data)
    assert len(watch.of_steps) == -(-len(steps) // 3)
    assert len(steps) % 3  # so the last step is of fewer batches
    pairs = data._prepared.division.train
    for number, accumulated in enumerate(watch.of_steps):
        together = [int(position) for step in steps[3 * number : 3 * number + 3] for position in step]
        module.zero_grad()
        module.objective(collate(pairs.__getitems__(together)))[0].mean().backward()
        for name, param in module.named_parameters():
            if name in accumulated:
                torch.testing.assert_close(accumulated[name], param.grad.to_dense(), rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_that_goes_on_has_the_rates_of_its_own_settings(model_path, votes, tmp_path):
    def rates(lr: float, *callbacks: Callback, checkpoint=None) -> list[list[tuple[float, float]]]:
        module = make(model_path)
        module.optim = Optim(lr=lr, user_lr=10 * lr, weight_decay=lr, warmup_steps=4)
        watch = Rates()
        trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=[SaveOnInterrupt(), watch, *callbacks])
        trainer.fit(module, make_data(votes, model_path), ckpt_path=checkpoint, weights_only=True)
        return watch.seen

    with pytest.raises(RuntimeError, match="crash"):
        rates(1e-2, Crash(5))
    resumed = rates(1e-3, checkpoint=tmp_path / "checkpoints/interrupted.ckpt")
    assert resumed == rates(1e-3)[5:]  # as if they had been so from the beginning
    assert len(resumed) == 5


class Rates(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, *args) -> None:
        self.seen.append([(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups])
