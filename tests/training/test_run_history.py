"""A run that goes on has one curve, the best checkpoint of all of it, and never takes another run for its own."""

from __future__ import annotations

import csv
import os

import pytest
import torch
import yaml

from prlhf_lightning.cli.earlier_runs import last_checkpoint
from prlhf_lightning.cli.main import main
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.loggers import MetricsFile, read_metrics
from prlhf_lightning.training.run_history import best_of_earlier_run, rows_until

TRAIN, VALIDATION = {"train/loss": "0.7", "val/loss": ""}, {"train/loss": "", "val/loss": "0.6"}


def at(step: int, row: dict[str, str]) -> dict[str, str]:
    return {"step": str(step), **row}


def test_rows_that_are_written_again_are_left_out():
    rows = [at(0, TRAIN), at(1, TRAIN), at(1, VALIDATION), at(1, VALIDATION), at(2, TRAIN)]
    assert rows_until(rows, step=2, validations=1) == rows[:3]
    assert rows_until(rows, step=2, validations=0) == rows[:2]
    assert rows_until(rows, step=3, validations=2) == rows
    assert rows_until(rows, step=2, validations=None) == rows[:4]  # the file of an earlier version


def test_a_row_that_is_half_written_is_none(tmp_path):
    (path := tmp_path / "metrics.csv").write_text("step,train/loss\n0,0.7\n1,0.6")
    assert read_metrics(path) == [{"step": "0", "train/loss": "0.7"}]
    path.write_text("step,train/loss\n0,0.7\n1\n")
    assert read_metrics(path) == [{"step": "0", "train/loss": "0.7"}]
    assert read_metrics(tmp_path / "none.csv") == []


def test_a_new_header_never_leaves_the_file_without_its_rows(tmp_path, monkeypatch):
    writer = MetricsFile(str(tmp_path))
    writer.log_metrics({"train/loss": 0.7}, 0)
    writer.save()
    writer.log_metrics({"val/loss": 0.6}, 0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": "0", "train/loss": "0.7"}]


def test_the_best_so_far_is_kept_in_the_new_folder_too(tmp_path):
    old, new = tmp_path / "version_0/checkpoints", tmp_path / "version_1/checkpoints"
    old.mkdir(parents=True)
    (old / "best-step2.ckpt").write_bytes(b"best")
    path = str(old / "best-step2.ckpt")
    state = {"best_k_models": {path: 0.5}, "best_model_path": path, "kth_best_model_path": path}
    found = best_of_earlier_run(state, old, new)
    assert found["best_k_models"] == {found["best_model_path"]: 0.5}
    assert (new / "best-step2.ckpt").read_bytes() == b"best"
    (old / "best-step2.ckpt").unlink()
    assert best_of_earlier_run(state, old, new) is None


def write_run(root, number, age, **model):
    folder = root / f"version_{number}"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint_files.save({}, path := folder / "checkpoints/last.ckpt")
    os.utime(path, (1000 - age, 1000 - age))
    config = {"seed_everything": 0, "model": {"optim": {"lr": 0.1}} | model, "data": {"batch_size": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return path, config


def test_last_is_the_last_run_of_the_same_settings(tmp_path):
    mine, config = write_run(tmp_path, 0, age=9)
    newer, _ = write_run(tmp_path, 1, age=1, optim={"lr": 0.2})
    assert last_checkpoint(tmp_path) == newer
    assert last_checkpoint(tmp_path, settings=config) == mine
    assert last_checkpoint(tmp_path, settings=config | {"data": {"batch_size": 4}}) == mine
    with pytest.warns(UserWarning, match=r"model.optim.lr was 0.2 and is 0.3.*--ckpt_path .*version_1"):
        assert last_checkpoint(tmp_path, settings=config | {"model": {"optim": {"lr": 0.3}}}) is None


def curve(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        timed = ("per_second", "peak_memory")
        return [{k: v for k, v in row.items() if not any(part in k for part in timed)} for row in csv.DictReader(file)]


def test_a_run_stopped_in_an_epoch_resumes_its_curve_and_best(votes, tmp_path):
    command = ["fit", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=2",
               "--model.user_model=IndividualUserModel", "--model.user_model.num_tokens=1", "--collapse.prompts=0",
               "--model.policy=CausalLMPolicy", "--model.policy.model=builtin:byte-lm", "--model.policy.random_init=0",
               "--model.loss=DPOLoss", "--model.optim={lr: 0.01, user_lr: 0.1, schedule: constant}",
               "--trainer.enable_progress_bar=false", "--data.source=FileSource", f"--data.source.train={votes}",
               "--data.validation_fraction=0.2", "--ckpt_path=last"]  # fmt: skip
    main([*command, f"--trainer.default_root_dir={tmp_path}/straight"])
    for steps in (7, -1):
        main([*command, f"--trainer.default_root_dir={tmp_path}/stopped", f"--trainer.max_steps={steps}"])
    straight, resumed = tmp_path / "straight/version_0", tmp_path / "stopped/version_1"
    assert len(curve(straight)) > 5
    assert curve(resumed) == curve(straight)
    files = {path.name for path in (straight / "checkpoints").iterdir()}
    assert {path.name for path in (resumed / "checkpoints").iterdir()} == files
    assert (resumed / "users_seen.csv").read_bytes() == (straight / "users_seen.csv").read_bytes()
    for name in files:
        one, other = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (straight, resumed))
        assert all(torch.equal(weight, other["state_dict"][key]) for key, weight in one["state_dict"].items())
