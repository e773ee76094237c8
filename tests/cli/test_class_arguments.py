"""A class that takes another's place, by a later option or file, starts from its own defaults."""

from __future__ import annotations

from inspect import signature

import pytest
import yaml

from prlhf_lightning.cli import class_arguments
from prlhf_lightning.cli.main import main
from prlhf_lightning.losses import DPOLoss, IPOLoss, SimPOLoss
from prlhf_lightning.user_models import ClusterUserModel, UniformUserModel


@pytest.fixture
def config_of(repo_root, capsys, monkeypatch):
    """Return the configuration that words come to after `p_dpo.yaml`, and what is said."""
    monkeypatch.setattr(class_arguments, "_told", set())

    def config_of(*words: str):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(repo_root / "configs/p_dpo.yaml"), *words, "--print_config"])
        said = capsys.readouterr()
        return yaml.safe_load(said.out), said.err

    return config_of


def defaults(cls):
    return {one.name: one.default for one in signature(cls).parameters.values()}


@pytest.mark.parametrize(
    ("setting", "cls", "dropped"),
    [
        ("loss", IPOLoss, "Not kept from DPOLoss: sft_weight=0.2."),
        ("loss", SimPOLoss, "Not kept from DPOLoss: sft_weight=0.2."),
        ("user_model", UniformUserModel, ""),  # its 10 tokens are the old class's default
        ("user_model", ClusterUserModel, ""),
    ],
)
def test_on_the_command_line(config_of, setting, cls, dropped):
    config, said = config_of(f"--model.{setting}", cls.__name__)
    assert config["model"][setting]["init_args"] == defaults(cls)
    assert dropped in said


def test_in_a_second_file(config_of, tmp_path):
    (tmp_path / "ipo.yaml").write_text("model: {loss: {class_path: IPOLoss}}")
    config, said = config_of("--config", str(tmp_path / "ipo.yaml"))
    assert config["model"]["loss"]["init_args"] == defaults(IPOLoss)
    assert "IPOLoss takes the place of DPOLoss" in said


def test_arguments_after_the_class_hold_and_earlier_are_told(config_of):
    config, said = config_of("--model.loss.beta", "3", "--model.loss", "SimPOLoss", "--model.loss.gamma", "2")
    assert config["model"]["loss"]["init_args"] == defaults(SimPOLoss) | {"gamma": 2.0}
    assert "Not kept from DPOLoss: beta=3.0, sft_weight=0.2." in said


@pytest.mark.parametrize("name", ["DPOLoss", "prlhf_lightning.DPOLoss", "prlhf_lightning.losses.margin.DPOLoss"])
def test_a_class_keeps_its_arguments_under_any_of_its_paths(config_of, name):
    config, said = config_of("--model.loss", name, "--model.loss.label_smoothing", "0.1")
    expected = defaults(DPOLoss) | {"beta": 0.1, "sft_weight": 0.2, "label_smoothing": 0.1}
    assert config["model"]["loss"]["init_args"] == expected
    assert "takes the place" not in said


def test_of_a_source_and_a_logger_too(config_of):
    words = ["--data.source=SimulatedSource", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here"]
    config, said = config_of(*words, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=there")
    assert "train" not in config["data"]["source"]["init_args"]
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "there"
    assert "Not kept from FileSource: train='votes.jsonl'." in said
    assert "Not kept from CSVLogger: save_dir='here'." in said
