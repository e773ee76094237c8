"""Configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.shipped_configs import with_shipped_configs


@pytest.mark.parametrize("words", [["-c", "p_dpo.yaml"], ["--config", "configs/p_dpo.yaml"], ["--config=p_dpo.yaml"]])
def test_a_shipped_config_is_found_from_any_folder(words, repo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_shipped_configs(["fit", *words])[-1].removeprefix("--config=") == str(repo_root / "configs/p_dpo.yaml")


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p_dpo.yaml").write_text("trainer: {max_epochs: 7}")
    words = ["fit", "--config", "p_dpo.yaml", "--config", "nowhere.yaml", "--model.policy.model", "p_dpo.yaml"]
    assert with_shipped_configs(words) == words


def test_two_shipped_configs_make_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "p_dpo.yaml", "--config", "overrides/fsdp2.yaml", "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["strategy"]["class_path"] == "prlhf_lightning.FSDP2Strategy"
    assert printed["trainer"]["max_epochs"] == 2
