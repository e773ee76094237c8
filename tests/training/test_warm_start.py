"""A fit that starts from the weights and users of an earlier one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_votes
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer
from safetensors.torch import load_file, save_file
from test_training import USER_MODELS, make, make_data, make_trainer

from prlhf_lightning.cli.export import export
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BCOLoss, DPOLoss, IPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.policies.loading import warning_of_other_base

POLICIES = {"lora": LoRA(rank=2), "full": None}


class AtStart(Callback):
    """Notes weights and the optimizer's state as training starts, and stops it."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: param.detach().clone() for name, param in pl_module.named_parameters()}
        self.state = trainer.optimizers[0].state_dict()["state"]
        self.rate_at_start = trainer.lr_scheduler_configs[0].scheduler.last_epoch
        trainer.should_stop = True


def earlier(model_path, votes, folder: Path, name: str, lora) -> Path:
    """Train a module, and return its checkpoint."""
    module = make(model_path, USER_MODELS[name](), BCOLoss(), lora=lora)
    trainer = make_trainer(folder)
    trainer.fit(module, make_data(votes, model_path, history_size=module.user_model.history_size))
    trainer.save_checkpoint(folder / "earlier.ckpt")
    return folder / "earlier.ckpt"


@pytest.fixture
def new_votes(tmp_path: Path) -> Path:
    """Votes of two of the four earlier users, and of two new ones, whom the alphabet puts among them."""
    return write_votes(tmp_path / "new.jsonl", {"bob": 6, "cat": 6, "dee": 6, "aaa": 6}, seed=1)


@pytest.mark.parametrize("lora", POLICIES)
@pytest.mark.parametrize("name", USER_MODELS)
def test_weights_and_users_are_those_of_the_earlier_training(model_path, votes, new_votes, tmp_path, name, lora):
    path = earlier(model_path, votes, tmp_path, name, POLICIES[lora])
    saved = torch.load(path, weights_only=True)
    module, start = make(model_path, USER_MODELS[name](), IPOLoss(), lora=POLICIES[lora]), AtStart()
    module.start_from(path)
    data = make_data(new_votes, model_path, history_size=module.user_model.history_size)
    make_trainer(tmp_path, callbacks=[start], limit_val_batches=0).fit(module, data)
    assert module.vocabulary.ids == ("ann", "bob", "cy", "dee", "aaa", "cat")
    assert (start.state, start.rate_at_start) == ({}, 0)
    histories = {id(table) for table in module.user_model.history_tables()}
    tables = {id(table) for table in module.user_model.row_tables()}
    for key, param in module.named_parameters():
        if not param.requires_grad:
            continue
        before, here = saved["state_dict"][key], start.weights[key]
        if id(param) in histories:  # of who has votes in the new data, these count
            assert torch.equal(here[[0, 1, 3]], before[[0, 1, 3]]), key
            assert all(here[row].any() for row in (5, 6))
        elif id(param) in tables:
            assert torch.equal(here[:5], before), key
            assert torch.equal(here[5:], before[:1].expand(2, -1)), key
        else:
            assert torch.equal(here, before), key


@pytest.mark.parametrize("lora", POLICIES)
def test_the_reference_stays_the_base_model(model_path, votes, new_votes, tmp_path, lora):
    path = earlier(model_path, votes, tmp_path, "individual", POLICIES[lora])
    module = make(model_path, lora=POLICIES[lora])
    module.start_from(path)
    data = make_data(new_votes, model_path)
    make_trainer(tmp_path).fit(module, data)
    batch = next(iter(data.val_dataloader()[0]))
    base = CausalLMPolicy(model_path)
    base.build()
    expected = base.reference_log_probs(batch.prompt, [batch.chosen])[0].tokens
    found = module.policy.reference_log_probs(batch.prompt, [batch.chosen])[0].tokens
    assert torch.equal(found, expected)
    assert not torch.allclose(module.policy.log_probs(batch.prompt, [batch.chosen])[0].tokens, expected)


def test_a_run_that_started_from_another_is_gone_on_with_as_any(model_path, votes, new_votes, tmp_path):
    path = earlier(model_path, votes, tmp_path, "individual", LoRA(rank=2))

    def fit(checkpoint: Path | None = None):
        module = make(model_path)
        if checkpoint is None:
            module.start_from(path)
        keeps = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=5, save_top_k=-1)
        quiet_trainer(tmp_path, max_epochs=3, callbacks=[keeps]).fit(
            module, make_data(new_votes, model_path), ckpt_path=checkpoint
        )
        return module

    straight, resumed = fit(), fit(tmp_path / "kept/step=5.ckpt")
    for (key, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"lora": LoRA(rank=3)}, "policy.lora.rank (2 in the checkpoint, 3 in this model)"),
        ({"lora": None}, "The checkpoint does not fit this model"),
        ({"user_model": USER_MODELS["cluster"]()}, "The checkpoint does not fit this model"),
    ],
)
def test_another_model_is_refused(model_path, votes, tmp_path, other, told):
    path = earlier(model_path, votes, tmp_path, "individual", LoRA(rank=2))
    module = make(model_path, **other)
    module.start_from(path)
    with pytest.raises(ConfigurationError, match=re.escape(told)) as caught:
        make_trainer(tmp_path).fit(module, make_data(votes, model_path))
    assert str(path) in str(caught.value)


# ---- on the command line


@pytest.fixture(scope="module")
def run(model_path, tmp_path_factory) -> tuple[list[str], Path]:
    """The words of a fit, and its checkpoint."""
    folder = tmp_path_factory.mktemp("first")
    votes = write_votes(folder / "votes.jsonl", {"ann": 12, "bob": 12})
    words = ["fit", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2"]
    words += ["--model.user_model=IndividualUserModel", "--model.user_model.num_tokens=2", "--model.loss=DPOLoss"]
    words += ["--model.policy=CausalLMPolicy", f"--model.policy.model={model_path}", "--model.policy.lora.rank=2"]
    words += ["--data.source=FileSource", f"--data.source.train={votes}", "--data.validation_fraction=0.1"]
    words += ["--collapse.prompts=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        main([*words, f"--trainer.default_root_dir={folder}"])
    return words, folder / "version_0/checkpoints/last.ckpt"


def test_new_users_are_added(run, tmp_path, caplog):
    words, path = run
    votes = write_votes(tmp_path / "new.jsonl", {"bob": 12, "zoe": 12})
    with caplog.at_level("INFO"):
        main([*words, f"--data.source.train={votes}", f"--init_from={path}", f"--trainer.default_root_dir={tmp_path}"])
    assert "2 users keep their rows (1 of them have no votes in these data), and 1 new users" in caplog.text
    content = torch.load(tmp_path / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert content["prlhf_lightning"]["users"] == ["ann", "bob", "zoe"]
    before = torch.load(path, weights_only=True)["state_dict"]["user_model.offsets.weight"]
    after = content["state_dict"]["user_model.offsets.weight"]
    assert torch.equal(after[1], before[1])
    assert after[3].any()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.policy.lora.rank=3"], ["model.policy.lora.rank is 2 there and 3 here"]),
        (["--model.policy.lora.alpha=8"], ["model.policy.lora.alpha is 16 there and 8 here"]),
        (["--model.policy.lora=null"], ["model.policy.lora is set there and null here"]),
        (["--model.user_model.num_tokens=3"], ["model.user_model.num_tokens is 2 there and 3 here"]),
        (["--model.user_model=ClusterUserModel"], ["is IndividualUserModel there and ClusterUserModel here"]),
        (["--model.policy.model=builtin:byte-lm"], ["model.policy.model is ", "'builtin:byte-lm' here"]),
        (["--train_baseline=true"], ["init_from and train_baseline exclude one another"]),
        (["--init_from=nothing.ckpt"], ["init_from: there is no checkpoint", "nothing.ckpt"]),
        (["--init_from=last"], ["there is no checkpoint of any run in"]),
    ],
)
def test_settings_that_do_not_fit_are_named(run, tmp_path, words, told):
    with pytest.raises(SystemExit) as stopped:
        main([*run[0], f"--init_from={run[1]}", f"--trainer.default_root_dir={tmp_path}", *words])
    assert all(part in str(stopped.value) for part in told)


@pytest.mark.parametrize("folder", [True, False])
def test_the_last_run_to_go_on_with_is_one_of_the_same_start(run, tmp_path, folder, caplog):
    caplog.set_level("INFO")
    words, path = run
    root = shutil.copytree(path.parent.parent.parent, tmp_path / "runs")
    source = root / "version_0" if folder else root / "version_0/checkpoints/last.ckpt"
    words = [*words, f"--data.source.train={write_votes(tmp_path / 'new.jsonl', {'bob': 12, 'zoe': 12})}"]
    words += [f"--init_from={source}", "--ckpt_path=last", f"--trainer.default_root_dir={root}"]

    def fit(version: int, *more: str) -> dict:
        main([*words, *more])
        return torch.load(root / f"version_{version}/checkpoints/last.ckpt", weights_only=True)

    started, resumed = fit(1), fit(2, "--trainer.max_steps=3")
    assert started["prlhf_lightning"]["users"] == resumed["prlhf_lightning"]["users"] == ["ann", "bob", "zoe"]
    assert (started["global_step"], resumed["global_step"]) == (2, 3)
    assert resumed["prlhf_lightning"]["started_from"] == started["prlhf_lightning"]["started_from"]
    assert f"Going on from {root / 'version_1/checkpoints/last.ckpt'}" in caplog.text


@pytest.mark.parametrize("option", ["init_from", "ckpt_path"])
@pytest.mark.parametrize(("then", "now"), [("A", ""), ("", "A"), ("A", "B"), ("A", "A")])
def test_ids_that_are_hashed_otherwise_are_warned_of(run, tmp_path, monkeypatch, recwarn, option, then, now):
    def fit(key: str, *more: str) -> Path:
        hashing = [f"--data.hash_user_ids_with=SALT_{key}"] if key else []
        main([*run[0], *hashing, f"--trainer.default_root_dir={tmp_path}", *more])
        return tmp_path / "version_0/checkpoints/last.ckpt"

    monkeypatch.setenv("SALT_A", "a" * 32)
    monkeypatch.setenv("SALT_B", "b" * 32)
    path = fit(then)
    fit(now, f"--{option}={path}", "--trainer.max_steps=3")
    told = [str(warning.message) for warning in recwarn if "another id" in str(warning.message)]
    assert len(told) == (then != now)
    assert all("data.hash_user_ids_with" in one for one in told)
    assert b"a" * 32 not in path.read_bytes()


def test_two_meanings_of_last_in_one_command_are_refused(run):
    with pytest.raises(SystemExit, match="init_from: with --ckpt_path last"):
        main([*run[0], "--init_from=last", "--ckpt_path=last", f"--trainer.default_root_dir={run[1].parents[2]}"])


def test_an_explicit_checkpoint_of_another_start_is_warned_of(run, tmp_path):
    words = [*run[0], f"--init_from={run[1]}", f"--ckpt_path={run[1]}", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.warns(UserWarning, match="was not started from init_from"):
        main(words)


@pytest.mark.parametrize("adapters", [True, False])
def test_an_exported_folder_is_a_start_as_well(run, tmp_path, adapters):
    words, path = run
    folder = tmp_path / "exported"
    export(path, folder, adapters=adapters)
    base = [] if adapters else [f"--model.policy.model={folder}"]
    words = [*words, *base, f"--init_from={folder}", "--model.optim.lr=1e-12", "--model.optim.user_lr=1e-12"]
    main([*words, f"--trainer.default_root_dir={tmp_path}"])
    before, after = load_module(path, "before"), load_module(tmp_path / "version_0/checkpoints/last.ckpt", "after")
    ids = torch.tensor([[1, 5, 9, 7, 8]])
    assert torch.allclose(before.policy.lm(ids).logits, after.policy.lm(ids).logits, atol=1e-4)
    assert torch.allclose(before.user_model.offsets.weight, after.user_model.offsets.weight)
    assert after.vocabulary == before.vocabulary


def test_a_whole_model_must_be_the_base(run, tmp_path):
    words, path = run
    export(path, tmp_path / "exported")
    with pytest.raises(SystemExit, match=re.escape("set model.policy.model to it as well")):
        main([*words, f"--init_from={tmp_path / 'exported'}", f"--trainer.default_root_dir={tmp_path}"])


def test_the_loss_starts_anew(model_path, votes, tmp_path):
    path = earlier(model_path, votes, tmp_path, "individual", LoRA(rank=2))
    module, start = make(model_path, loss=BCOLoss()), AtStart()
    fresh = {name: value.clone() for name, value in module.loss.state_dict().items()}
    module.start_from(path)
    make_trainer(tmp_path, callbacks=[start], max_steps=0).fit(module, make_data(votes, model_path))
    assert fresh
    assert all(torch.equal(module.loss.state_dict()[name], value) for name, value in fresh.items())


def test_a_module_that_has_users_is_refused(model_path, votes, tmp_path):
    module = make(model_path, loss=DPOLoss())
    make_trainer(tmp_path).fit(module, make_data(votes, model_path))
    with pytest.raises(ConfigurationError, match="make a new PersonalizedLM"):
        module.start_from(tmp_path / "a.ckpt")


def test_a_base_model_with_other_weights_is_warned_of(model_path, votes, tmp_path):
    path = earlier(model_path, votes, tmp_path, "individual", LoRA(rank=2))
    other = Path(shutil.copytree(model_path, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    module = make(str(other))
    module.start_from(path)
    with pytest.warns(UserWarning, match=r"init_from: The weights of the base model .*other are not those of training"):
        make_trainer(tmp_path, max_steps=0).fit(module, make_data(votes, model_path))


@pytest.mark.parametrize("same", [True, False])
def test_a_base_model_in_another_dtype_is_no_other_model(model_path, votes, tmp_path, caplog, same):
    path = earlier(model_path, votes, tmp_path, "individual", LoRA(rank=2))
    here = Path(shutil.copytree(model_path, tmp_path / "other"))
    weights = load_file(here / "model.safetensors")
    if not same:
        weights = {name: weight * 1.1 for name, weight in weights.items()}
        save_file(weights, here / "model.safetensors", {"format": "pt"})
    policies = [CausalLMPolicy(name, dtype=dtype) for name, dtype in ((model_path, "float32"), (str(here), "bfloat16"))]
    for policy in policies:
        policy.build()
    said = warning_of_other_base(torch.load(path)["prlhf_lightning"]["base"], policies[1].base_identity(), "base")
    assert (said is None) == same
    assert ("base had dtype float32 in training, and bfloat16 now" in caplog.text) == same
    assert warning_of_other_base(policies[0].base_identity(), policies[0].base_identity(), "base") is None
