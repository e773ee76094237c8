"""A run's files are in the run's folder, whatever its loggers."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.wandb import WandbLogger
from recording_logger import RecordingLogger

from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.parser import Explaining
from prlhf_lightning.training.loggers import hyper_parameters, keep_under, run_folder, with_run_folder

FILES = {"config.yaml", "metrics.csv", "users_seen.csv", "checkpoints"}
TENSORBOARD = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "events"}}
CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "events"}}
REMOTE = {"class_path": "recording_logger.RecordingLogger"}


@pytest.fixture
def settings(model_path, votes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "user_model": {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 1}},
            "policy": {"class_path": "CausalLMPolicy", "init_args": {"model": model_path, "lora": {"rank": 2}}},
            "loss": {"class_path": "DPOLoss"},
        },
        "data": {"source": {"class_path": "FileSource", "init_args": {"train": str(votes)}}, "batch_size": 8,
                 "validation_fraction": 0.2},
        "collapse": {"prompts": 0},
    }  # fmt: skip
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(path)]


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (REMOTE, "runs/version_0"),
        (False, "runs/version_0"),
        (True, "runs/version_0"),
        (TENSORBOARD, "events/lightning_logs/version_0"),
        (CSV, "events/lightning_logs/version_0"),
        ([TENSORBOARD, CSV, REMOTE], "events/lightning_logs/version_0"),
        ([REMOTE, TENSORBOARD], "events/lightning_logs/version_0"),
    ],
    ids=str,
)
def test_a_runs_files_are_in_its_folder_and_the_next_resumes(logger, folder, settings, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    command = [*settings, "--trainer.logger", json.dumps(logger)]
    main(command)
    assert {path.name for path in Path(folder).iterdir()} >= FILES
    assert {path.name for path in tmp_path.iterdir()} - before - {"cache"} == {folder.partition("/")[0]}
    with Path(folder, "metrics.csv").open() as file:
        assert any(row["train/loss"] for row in csv.DictReader(file))
    main([*command, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    last = Path(folder).with_name("version_1") / "checkpoints/last.ckpt"
    first = torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert torch.load(last, weights_only=True)["global_step"] == 2 * first > 0


@pytest.mark.parametrize(
    ("logger", "folder"), [(True, "mine/version_0"), (TENSORBOARD, "events/lightning_logs/version_0")]
)
def test_a_run_resumes_from_any_folder_by_its_own_configuration(logger, folder, settings, tmp_path, monkeypatch):
    main([*settings, "--trainer.default_root_dir=mine", "--trainer.logger", json.dumps(logger)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = tmp_path / folder / "config.yaml"
    main(["fit", "--config", str(config), "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert not list(Path().iterdir())
    first, last = (
        torch.load(tmp_path / folder / f"../{name}/checkpoints/last.ckpt", weights_only=True)["global_step"]
        for name in ("version_0", "version_1")
    )
    assert last == 2 * first > 0


def test_loggers_get_the_settings_and_metrics_but_no_user(settings):
    main([*settings, "--trainer.logger", "recording_logger.RecordingLogger", "--model.optim.lr", "0.003",
          "--model.optim.user_lr", "0.05"])  # fmt: skip
    assert RecordingLogger.settings["model.optim.lr"] == 0.003
    assert RecordingLogger.settings["model.loss.class_path"].endswith("DPOLoss")
    assert not any(user in str(RecordingLogger.settings) for user in ("ann", "bob", "dee"))
    values = RecordingLogger.values
    assert max(values["train/lr"]) == pytest.approx(0.003)
    assert values["train/table_lr"][-1] == pytest.approx(values["train/lr"][-1] * 0.05 / 0.003)
    positive = ("grad_norm", "pairs_per_second", "tokens_per_second", "peak_memory_gib")
    assert all(value > 0 and math.isfinite(value) for name in positive for value in values[f"train/{name}"])


def test_settings_that_may_be_secret_are_kept_from_loggers():
    config = {
        "trainer": {"logger": {"init_args": {"api_key": "S"}}, "max_epochs": 2},
        "data": {"source": {"init_args": {"url": "postgresql://me:S@host/db"}}, "columns": {"user_id": "worker"}},
        "parts": [{"class_path": "A"}, {"class_path": "B"}],
    }
    assert hyper_parameters(config) == {
        "trainer.max_epochs": 2, "data.columns.user_id": "worker", "parts.0.class_path": "A", "parts.1.class_path": "B",
    }  # fmt: skip


def test_a_run_that_fails_before_it_writes_leaves_no_folder(settings, tmp_path):
    with pytest.raises(SystemExit):
        main([*settings, "--data.source.train", "missing.jsonl"])
    assert list((tmp_path / "runs").iterdir()) == []


def _claim(root: str, number: int) -> str:
    return str(with_run_folder(None, root)[1])


def test_runs_that_start_together_get_a_folder_each(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(_claim, [(str(tmp_path), number) for number in range(40)])
    assert sorted(folders) == sorted(str(tmp_path / f"version_{number}") for number in range(40))


def test_a_named_version_is_the_runs_folder(tmp_path):
    loggers, made = with_run_folder(TensorBoardLogger(tmp_path, name="study", version="high-rate"), "runs")
    assert made is None
    assert loggers[0].log_dir == loggers[1].log_dir == str(tmp_path / "study" / "high-rate")


def test_a_given_logger_of_tables_is_the_one_that_writes(tmp_path):
    given = CSVLogger(tmp_path, name="study")
    loggers, made = with_run_folder([given], "runs")
    assert loggers == [given]
    assert made == tmp_path / "study" / "version_0" == Path(given.log_dir)


def test_loggers_of_the_current_directory_write_beside_runs(monkeypatch):
    # Its constructor asks for the package, which is not needed to read its settings.
    parser = Explaining()
    parser.add_argument("--logger", type=WandbLogger)
    by_default, given = (
        parser.parse_args(["--logger", "WandbLogger", *words]).logger for words in ([], ["--logger.save_dir", "mine"])
    )
    keep_under("runs", [by_default, given])
    assert [by_default.init_args.save_dir, given.init_args.save_dir] == ["runs", "mine"]


def test_in_python_the_folder_is_lightnings_checkpoint_folder(tmp_path):
    from quiet_trainer import quiet_trainer

    assert run_folder(quiet_trainer(tmp_path, logger=False)) == tmp_path
    trainer = quiet_trainer(tmp_path, logger=RecordingLogger(str(tmp_path)))
    assert run_folder(trainer) == tmp_path / "project" / "1a2b3c"
