"""What the command line answers to a mistake, and what a trial run leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import short_runs

from prlhf_lightning.cli.main import main
from prlhf_lightning.training import checkpoint_files


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])


BASE = {
    "model.policy": "CausalLMPolicy",
    "model.policy.model": "builtin:byte-lm",
    "model.loss": "DPOLoss",
    "model.user_model": "UniformUserModel",
    "data.source": "FileSource",
    "data.source.train": "votes.jsonl",
}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", "--data.train", "votes.jsonl"], "'data.train': did you mean 'data.source.train'?"),
        (["fit", "--batch_size", "4"], "did you mean 'data.batch_size'?"),
        (["fit", "--lr", "1"], "did you mean 'model.optim.lr'?"),
        (["fit", "--model.beta", "1"], "did you mean 'model.loss.beta'?"),
        (["fit", "--data.source", "votes.jsonl"], "To give votes.jsonl: --data.source.train votes.jsonl"),
        (["fit", "--model.policy", "a/model"], "To give a/model: --model.policy.model a/model"),
        (["fit", "--model.loss", "dpo"], "There are: AOTLoss, AOTUnpairedLoss"),
        (["fit", "--model.loss.bta", "1"], "prlhf-lightning fit --help"),
        (["fit", "--model.loss", "nobodys_losses.MyLoss"], "nobodys_losses.py is looked for in "),
        (["train"], "There are: fit, validate, test, predict, adapt, export, generate"),
        ([], "There are: fit, validate, test, predict, adapt, export, generate"),
        (["chek"], "'chek': did you mean 'data check'?"),
        (["data", "check", "--trian", "x"], "'trian': did you mean 'train'?"),
        (["users"], "prlhf-lightning users --help"),
        (["users", "list"], "prlhf-lightning users list --help"),
    ],
)
def test_a_mistake_is_answered_by_what_was_meant(capsys, words, says):
    config = [f"--{name}={value}" for name, value in BASE.items()] if words[:1] == ["fit"] else []
    with pytest.raises(SystemExit):
        main([*words[:1], *config, *words[1:]])
    assert says in capsys.readouterr().err


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("prlhf_lightning 0.")


@pytest.fixture
def settings(model_path, votes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = {"model": model_path, "lora": {"rank": 2}}
    model = {"user_model": "IndividualUserModel"}
    content = short_runs.run_config(Path(), policy, votes, trainer={"max_steps": 1}, model=model)
    short_runs.write_config(tmp_path, content)
    return ["fit", "-c", "config.yaml"]


def test_a_trial_run_leaves_no_files(settings, tmp_path):
    before = set(tmp_path.iterdir())
    main([*settings, "--trainer.fast_dev_run", "true", "--train_baseline", "true"])
    left = set(tmp_path.iterdir()) - before - {tmp_path / "cache"}
    assert not [path for folder in left for path in (folder, *folder.rglob("*")) if path.is_file()]


def test_a_logger_that_is_not_installed_says_what_to_install(settings, monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("Requirement 'wandb' not met. HINT: Try running `pip install -U 'wandb'`")

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger.__init__", absent)
    with pytest.raises(SystemExit, match=r"^error: Requirement 'wandb' not met"):
        main([*settings, "--trainer.logger", "WandbLogger"])


def test_a_run_ends_with_its_checkpoints_or_warns_of_others(settings, model_path, tmp_path, caplog):
    main(settings)
    assert "Checkpoints: runs/version_0/checkpoints/last.ckpt" in caplog.text
    shutil.copytree(model_path, tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"trained on model\.policy\.model .*, and this is .*elsewhere"):
        main([*settings, "--model.policy.model=elsewhere", "--ckpt_path=runs/version_0", "--trainer.max_steps=2"])


def test_a_run_ends_with_what_personalization_gains(settings, tmp_path, caplog, capsys):
    main([*settings, "--trainer.max_steps", "-1"])
    (said,) = [line for line in caplog.messages if line.startswith("Personalization")]
    assert said.endswith(" points of pair accuracy against the generic user (held-out data, 2 users).")
    main(["shrink", "--model", "runs/version_0/checkpoints/last.ckpt", "--output", "runs/shrunk.ckpt"])
    assert "Written to runs/shrunk.ckpt, with rows" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "runs/version_0/config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"validation: no config\.yaml beside .* says what its run held out"):
        main(["shrink", "--model", "runs/version_0/checkpoints/last.ckpt"])
    with pytest.raises(SystemExit, match="columns, hash_user_ids_with: these options need a file"):
        main(["shrink", "--model", "runs/version_0/checkpoints/last.ckpt", "--columns", "{user_id: worker}"])


def test_rows_are_shrunk_unless_told_otherwise(settings, caplog, capsys, monkeypatch):
    monkeypatch.setattr("prlhf_lightning.adaptation.shrink_users.most_likely", lambda *_: 0.5)
    for number, option in enumerate(([], ["--shrink_users", "false"])):
        caplog.clear()
        main([*settings, "--trainer.max_steps", "-1", *option])
        entry = checkpoint_files.load(Path(f"runs/version_{number}/checkpoints/last.ckpt"))["prlhf_lightning"]
        assert entry.get("shrunk") == (None if option else 0.5)
        assert ("distance from the generic user: 0.5 in" in caplog.text) == (not option)
    main(["shrink", "--model", "runs/version_0/checkpoints/last.ckpt"])
    assert "rows have 0.5 of the distance that they were trained to" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_can_be_used_from_any_folder(settings, model_path, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(model_path)
    main([*settings, "--model.policy.model", "model"])
    monkeypatch.chdir(tmp_path / "runs")
    main(["export", "--model", "version_0/checkpoints/last.ckpt", "--output", "exported"])
    assert (tmp_path / "runs/exported/model.safetensors").exists()


def test_without_validation_nothing_is_best_or_compared(settings, tmp_path, caplog, capsys, recwarn):
    main([*settings, "--train_baseline", "true"])
    assert "No validation yet, so no val/seen/loss" in caplog.text
    assert not [warned for warned in recwarn if "could not find the monitored key" in str(warned.message)]
    assert "Nothing was validated on, so there is nothing to compare." in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("runs/*/checkpoints/*")] == ["last.ckpt"]


def test_a_model_that_keeps_no_users_is_told_nothing_of_them(settings, votes):
    main([*settings, "--model.user_model", "UniformUserModel"])
    with pytest.raises(SystemExit, match="holds no trained user rows, so there is no prior"):
        main(["adapt", "--model", "runs/version_0/checkpoints/last.ckpt", "--feedback", str(votes)])


def test_a_run_without_an_intact_checkpoint_is_no_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    for command in (["generate", "--prompt", "Hi"], ["users", "list"], ["report"]):
        with pytest.raises(SystemExit, match=r"^error: model: no checkpoint in .*/checkpoints is intact"):
            main([*command, "--model", str(tmp_path)])
