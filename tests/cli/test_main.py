"""The command line, in process."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from short_runs import run_config, write_config

from prlhf_lightning.cli.fit import read_whole_numbers_first
from prlhf_lightning.cli.main import main
from prlhf_lightning.losses import MarginLoss
from prlhf_lightning.training import PersonalizedLM


@pytest.fixture
def config(model_path, votes, tmp_path):
    content = run_config(
        tmp_path,
        {"model": model_path, "lora": {"rank": 2}},
        votes,
        trainer={"max_epochs": 1, "log_every_n_steps": 1},
        model={"loss": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}}, "sampling": {"max_new_tokens": 4}},
        data={"validation_fraction": 0.2},
    )
    return write_config(tmp_path, content)


def run(*args: object) -> None:
    main([str(arg) for arg in args])


def fails(capsys, *args: object) -> str:
    """Run a command that must exit with an error; return what it says."""
    with pytest.raises(SystemExit) as exit_info:
        run(*args)
    said = capsys.readouterr().err + (exit_info.value.code if isinstance(exit_info.value.code, str) else "")
    assert "Traceback" not in said
    return said


def test_fit_leaves_checkpoints_a_log_and_a_table_of_users(config, tmp_path):
    run("fit", "-c", config)
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"config.yaml", "metrics.csv", "users_seen.csv"} <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoints/last.ckpt").exists()
    assert len(list((folder / "checkpoints").glob("best-*.ckpt"))) == 1
    with (folder / "users_seen.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["user_id"] for row in rows} <= {"ann", "bob", "cy", "dee"}
    assert all(0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1 for row in rows)


@pytest.mark.parametrize("prompts", [4, 0])
def test_validation_measures_answers_unless_told_not_to(config, tmp_path, prompts):
    run("fit", "-c", config, "--collapse.prompts", prompts)
    (path,) = (tmp_path / "runs").glob("*/metrics.csv")
    with path.open() as file:
        values = [
            row["val/generated_repetition"] for row in csv.DictReader(file) if row.get("val/generated_repetition")
        ]
    assert len(values) == (1 if prompts else 0)


def test_a_checkpoint_rebuilds_the_model_from_its_own_settings(config, tmp_path):
    run("fit", "-c", config)
    checkpoint = next((tmp_path / "runs").glob("*/checkpoints/last.ckpt"))
    module = PersonalizedLM.load_from_checkpoint(checkpoint, weights_only=True)
    assert module.vocabulary.ids == ("ann", "bob", "cy", "dee")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(module.user_model.offsets.weight, saved["user_model.offsets.weight"])


def test_validate_and_predict_from_a_checkpoint(config, tmp_path):
    run("fit", "-c", config)
    checkpoint = next((tmp_path / "runs").glob("*/checkpoints/last.ckpt"))
    run("validate", "-c", config, "--ckpt_path", checkpoint)
    run("predict", "-c", config, "--ckpt_path", checkpoint)
    (predictions,) = (tmp_path / "runs").glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert rows
    for row in rows:  # each can be joined to its row of the data
        assert set(row) == {"row", "set", "user_id", "prompt", "completion"}
        path, _, number = row["row"].rpartition(":")
        given = json.loads(Path(path).read_text().splitlines()[int(number) - 1])
        assert (given["user_id"], given["prompt"]) == (row["user_id"], row["prompt"])


def test_a_checkpoint_is_measured_by_itself_in_any_folder(config, tmp_path, votes, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    votes.rename(tmp_path / "here/votes.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    run("fit", "-c", config, "--data.source.train", "votes.jsonl")
    monkeypatch.chdir(tmp_path / "elsewhere")
    last = tmp_path / "runs/version_0/checkpoints/last.ckpt"
    with (tmp_path / "runs/version_0/users_seen.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = [int(row["pairs"]) for row in rows]
    share = sum(int(row["pairs"]) * float(row["accuracy"]) for row in rows) / sum(pairs)
    capsys.readouterr()
    for checkpoint in (last, last.parent.parent):  # the run's folder will do as well
        run("validate", "--ckpt_path", checkpoint)
        said = " ".join(capsys.readouterr().out.split())
        assert f"users {len(rows)} pairs {sum(pairs)} pair accuracy {share:.3f} [" in said
    run("predict", "--ckpt_path", last)
    (last.parent.parent / "config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"config: there is no .*config\.yaml, as `fit` writes it"):
        run("validate", "--ckpt_path", last)


def test_with_a_baseline_both_models_are_compared_and_kept(config, tmp_path, capsys, caplog):
    run("fit", "-c", config, "--train_baseline", "true")
    (path,) = (tmp_path / "runs").glob("*/comparison.json")
    results = json.loads(path.read_text())
    assert set(results) == {"vanilla", "personalized"}
    baseline = PersonalizedLM.load_from_checkpoint(path.parent / "baseline/last.ckpt", weights_only=True)
    assert not baseline.user_model.personalizes
    assert f"The baseline's checkpoint: {path.parent / 'baseline/last.ckpt'}" in caplog.text
    with pytest.raises(SystemExit, match="there is no checkpoint of any run"):  # it is none of the run's own
        run("validate", "--ckpt_path", "last", "--trainer.default_root_dir", path.parent / "baseline")
    assert results["vanilla"]["val/seen/generic_accuracy"] == results["vanilla"]["val/seen/accuracy"]
    assert "pair accuracy, seen users" in capsys.readouterr().out


class CubeLoss(MarginLoss):
    """A loss from outside the package."""

    def margin_loss(self, margin: torch.Tensor) -> torch.Tensor:
        return (1 - margin) ** 3


def test_a_loss_from_outside_the_package_is_named_by_its_path(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_losses", sys.modules[__name__])
    monkeypatch.setattr(CubeLoss, "__module__", "my_losses")
    run("fit", "-c", config, "--model.loss", "my_losses.CubeLoss", "--model.loss.beta", 0.5)
    with pytest.raises(SystemExit):
        run("fit", "-c", config, "--model.loss", "my_losses.CubeLoss", "--model.loss.beta", 0.5, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["loss"] == {"class_path": "my_losses.CubeLoss", "init_args": {"beta": 0.5, "sft_weight": 0}}


def test_one_batch_is_not_all_batches():
    parser = LightningArgumentParser()
    parser.add_argument("--limit", type=float | int | None)
    read_whole_numbers_first(parser)
    assert [type(parser.parse_args([f"--limit={word}"]).limit) for word in ("1", "1.0")] == [int, float]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.loss", "DPOLos"], "'DPOLos': did you mean 'DPOLoss'"),
        (["--model.loss", "nowhere.to.be.found.Loss"], "No module named 'nowhere'"),
        (["--model.loss.betta", "1"], "Option 'betta' is not accepted"),
        (["--model.loss.betta", "1"], "'betta': did you mean 'beta'"),
        (["--model.alfa", "1"], "did you mean 'model.alpha'"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--model.alpha", "1.5"], "model.alpha is 1.5"),
        (["--model.loss.beta", "-1"], "beta is -1"),
        (["--data.source.train", "nothing.jsonl"], "nothing.jsonl"),
        (["--model.loss.gamma", "1"], "Here there are: beta, label_smoothing, sft_weight"),
        (["--model.policy.model", "/no/such/model"], "policy.model: the tokenizer of '/no/such/model'"),
        (["--model.policy.model", "builtin:styl-lm"], "built-in models are builtin:byte-lm"),
        (["--model.policy.lora.rank", "0"], "policy.lora.rank is 0"),
        (["--model.policy.lora.target_modules", "[nope]"], "policy.lora.target_modules is ['nope']"),
        (["--model.user_model.num_tokens", "-1"], "IndividualUserModel: num_tokens is -1"),
        (["--model.user_model", "CompositeUserModel", "--model.user_model.parts", "[]"], "parts is empty"),
        (["--model.sampling.max_new_tokens", "0"], "sampling.max_new_tokens is 0"),
        (["--model.sampling.temperature", "-1"], "sampling.temperature is -1"),
        (["--checkpoint.monitor", "val/seen/los"], "checkpoint.monitor is 'val/seen/los'; it must be one of val/"),
        (["--checkpoint.monitor", "nope"], "checkpoint.monitor is 'nope'"),
        (["--checkpoint.every_n_train_steps", "0"], "checkpoint.every_n_train_steps is 0"),
        (["--checkpoint.mode", "most"], "'min', 'max'"),
        (["--collapse.prompts", "-1"], "collapse.prompts is -1"),
        (["--ckpt_path", "nothing.ckpt"], "ckpt_path: there is no checkpoint nothing.ckpt"),
        (["--ckpt_path", "last.ckpt"], "ckpt_path: there is no checkpoint last.ckpt"),
        (["--ckpt_path", "best"], "ckpt_path: there is no checkpoint best"),
        (["--ckpt_path", __file__], "is damaged, or no checkpoint"),
        (["--trainer.strategy", "nope"], "trainer: You selected an invalid strategy name"),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "trainer.strategy: spawned processes cannot"),
        (["--trainer.accelerator", "nope"], "trainer: You selected an invalid accelerator name"),
        (["--trainer.devices", "-2"], "trainer: `devices` selected with `CPUAccelerator` should be"),
        (["--trainer.precision", "bf17"], "trainer.precision"),
        (["--trainer.max_epochs", "-5"], "`max_epochs` must be a non-negative integer or -1"),
        (["--trainer.limit_val_batches", "all"], "trainer.limit_val_batches"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches is 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch is 0"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0"),
        (["--trainer.val_check_interval", "6"], "trainer.val_check_interval is 6, but an epoch has 5 batches"),
        (["--trainer.limit_train_batches", "3", "--trainer.val_check_interval", "4"], "an epoch has 3 batches"),
        (["--trainer.default_root_dir", __file__], "trainer.default_root_dir: cannot write files to"),
        (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nope"], "conditioned on metric `nope`"),
    ],
)
def test_a_mistake_is_named_in_a_few_lines(config, capsys, args, says):
    said = fails(capsys, "fit", "-c", config, *args)
    assert says in said
    assert len(said.splitlines()) < 12


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"user": "ann", "prompt": "a", "chosen": "b", "rejected": "c"}', "user_id"),
        ('{"user_id": "ann", "prompt": "a", "chosen": " ", "rejected": "c"}', "'chosen'"),
        ('{"user_id": "ann", "prompt": "a", "chosen": "b", "rejected": "b"}', "'rejected'"),
        ('{"user_id": 7.5, "prompt": "a", "chosen": "b", "rejected": "c"}', "'user_id'"),
        ('{"user_id": "ann", "prompt": "a", "chosen": "b", "rejected": "c", "user_text": 3}', "'user_text'"),
        ('{"user_id": "ann", "prompt": "a", "chosen": "b"', "votes.jsonl:49"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field_before_any_output(config, votes, tmp_path, capsys, row, says):
    with votes.open("a") as file:
        file.write(row + "\n")
    said = fails(capsys, "fit", "-c", config)
    assert "votes.jsonl:49" in said
    assert says in said
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_any_process_names_a_bad_row_of_a_stream_in_one_line(config, votes, capsys):
    with votes.open("a") as file:
        file.write('{"user_id": "ann", "prompt": "a", "chosen": "b"}\n')
    said = fails(capsys, "fit", "-c", config, "--data.streaming", "true", "--data.num_workers", "1")
    assert f"error: {votes}:49: field 'rejected' is missing" in said


def test_training_resumes_with_the_settings_of_the_command(config, tmp_path):
    run("fit", "-c", config)
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/last.ckpt")
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    more = ["--trainer.max_epochs", 2, "--model.loss.beta", 0.3, "--model.optim.lr", 1e-3]
    run("fit", "-c", config, *more, "--ckpt_path", checkpoint)
    saved = torch.load(tmp_path / "runs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 * steps
    assert saved["hyper_parameters"]["loss"]["init_args"]["beta"] == 0.3
    assert saved["hyper_parameters"]["optim"]["lr"] == 1e-3


@pytest.mark.parametrize("interval", ["5", "1.0", "0.5", "00:00:00:01"])
def test_an_interval_of_validation_within_an_epoch_is_taken(config, interval):
    run("fit", "-c", config, "--trainer.max_steps", 1, "--trainer.val_check_interval", interval)


def test_an_interval_over_epochs_may_be_longer_than_one(config):
    more = ("--trainer.check_val_every_n_epoch", "null", "--trainer.max_steps", 1)
    run("fit", "-c", config, "--trainer.val_check_interval", 1000, *more)


def test_last_is_saved_by_steps_and_best_after_each_validation(config, tmp_path, monkeypatch):
    saved = []
    save = Trainer.save_checkpoint

    def note(self, path, *args, **kwargs):
        saved.append((self.global_step, Path(path).name.split("-")[0].removesuffix(".ckpt")))
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", note)
    run("fit", "-c", config, "--checkpoint.every_n_train_steps", 3, "--checkpoint.save_top_k", -1,
        "--trainer.max_epochs", 2, "--trainer.accumulate_grad_batches", 2, "--data.batch_size", 4)  # fmt: skip
    steps = saved[-1][0] // 2
    lasts, bests = ([step for step, name in saved if name == kind] for kind in ("last", "best"))
    assert bests == [steps, 2 * steps]
    assert sorted({*lasts}) == sorted({*range(3, 2 * steps + 1, 3), *bests})
    assert len(lasts) == len({*range(3, 2 * steps + 1, 3)}) + 2  # once a step, and after each validation


def test_last_resumes_from_the_newest_intact_checkpoint(config, tmp_path, capsys):
    fit = ["fit", "-c", config, "--ckpt_path", "last", "--trainer.max_epochs"]
    run(*fit, 1)  # there is none yet
    first = tmp_path / "runs/version_0/checkpoints"
    steps = torch.load(first / "last.ckpt", weights_only=True)["global_step"]
    (first / "last.ckpt").write_bytes((first / "last.ckpt").read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"Damaged: {first}/last.ckpt. .*that run is used: {first}/best-step{steps}"):
        run(*fit, 2)
    assert torch.load(tmp_path / "runs/version_1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2 * steps
    run("validate", "-c", config, "--ckpt_path", "last")
    for path in (tmp_path / "runs/version_1/checkpoints").iterdir():
        path.write_bytes(b"")
    assert "no checkpoint of the last run is intact" in fails(capsys, *fit, 3)


def test_last_is_an_error_where_there_is_nothing_to_validate(config, capsys):
    assert "there is no checkpoint of any run" in fails(capsys, "validate", "-c", config, "--ckpt_path", "last")


def test_a_full_disk_is_one_line_and_damage_names_a_whole_file(config, tmp_path, capsys, monkeypatch):
    run("fit", "-c", config)
    folder = tmp_path / "runs/version_0/checkpoints"
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:-100])
    said = fails(capsys, "fit", "-c", config, "--ckpt_path", folder / "last.ckpt")
    assert "last.ckpt is damaged" in said
    assert "The newest intact checkpoint beside it is" in said

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=r"^error: [^\n]* could not be written: No space left on device[^\n]*$"):
        run("fit", "-c", config, "--model.cache_reference", "false")


def test_a_run_whose_users_were_removed_goes_on_and_exports(config, tmp_path):
    run("fit", "-c", config)
    last = tmp_path / "runs/version_0/checkpoints/last.ckpt"
    run("users", "remove", "--model", last, "--user", "bob", "--all", "true")
    assert all(b"bob" not in path.read_bytes() for path in last.parent.iterdir())
    run("users", "add", "--model", last, "--user", "eve")
    run("validate", "-c", config, "--ckpt_path", last)
    run("fit", "-c", config, "--ckpt_path", last, "--trainer.max_epochs", 2)
    after = torch.load(tmp_path / "runs/version_2/checkpoints/last.ckpt", weights_only=True)
    assert after["prlhf_lightning"]["users"] == ["ann", "cy", "dee", "eve"]
    run("export", "--model", last, "--output", tmp_path / "exported")
    assert (tmp_path / "exported/model.safetensors").exists()


def test_a_run_shorter_than_the_logging_interval_is_logged(config, tmp_path, recwarn):
    run("fit", "-c", config, "--trainer.log_every_n_steps", 1000)
    (path,) = (tmp_path / "runs").glob("*/metrics.csv")
    with path.open() as file:
        assert any(row["train/loss"] for row in csv.DictReader(file))
    ours = ("logging interval", "on_before_batch_transfer", "dict_to_namespace")
    assert not [w for w in recwarn if any(words in str(w.message) for words in ours)]


def test_training_goes_on_without_best_where_its_set_is_missing(config, tmp_path):
    run("fit", "-c", config, "--checkpoint.monitor", "val/unseen/loss")
    (folder,) = (tmp_path / "runs").glob("*/checkpoints")
    assert [path.name for path in folder.iterdir() if path.name != "last.ckpt"] == ["best-step5.ckpt"]


def test_help_names_the_tasks(capsys):
    run("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "export Write a checkpoint as a Hugging Face model folder" in text
    assert "generate Generate answers for one or several users" in text


def test_a_misspelt_command_is_named(capsys):
    assert "did you mean 'export'" in fails(capsys, "exprt")


def test_help_explains_the_fields(capsys):
    with pytest.raises(SystemExit):
        run("fit", "--help")
    text = capsys.readouterr().out
    assert "Weight of the user's own term" in text
    assert "(type: float, default: 0.5)" in text


def test_files_are_found_beside_their_configuration(config, votes, tmp_path, monkeypatch):
    content = yaml.safe_load(config.read_text())
    content["data"]["source"] = {
        "class_path": "CombinedSource",
        "init_args": {"sources": [{"class_path": "FileSource", "init_args": {"train": [votes.name]}},
                                  {"class_path": "FileSource", "init_args": {"train": "vot*.jsonl"}}]},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(content))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run("fit", "-c", config, "--trainer.max_steps", 1)
    (saved,) = (tmp_path / "runs").glob("*/config.yaml")
    first, second = yaml.safe_load(saved.read_text())["data"]["source"]["init_args"]["sources"]
    assert first["init_args"]["train"] == [str(votes)]
    assert second["init_args"]["train"] == str(tmp_path / "vot*.jsonl")
