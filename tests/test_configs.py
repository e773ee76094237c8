"""Every configuration that is shipped trains for a step, on a small model and small files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from prlhf_lightning.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"


OVERRIDES = sorted((CONFIGS / "overrides").glob("*.yaml"))  # of other configurations; test_sharded.py trains with them


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.rglob("*.yaml")} - {*OVERRIDES}), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_config_trains_a_step(path, votes, thumbs, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    content = yaml.safe_load(path.read_text())
    overrides = ["--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false", "--trainer.accelerator",
                 "cpu", "--trainer.default_root_dir", tmp_path, "--baseline", "false"]  # fmt: skip
    if not content["model"]["policy"]["init_args"]["model"].startswith("builtin:"):
        overrides += ["--model.policy.model", model_path, "--model.policy.dtype", "float32"]
    source = content["data"]["source"]
    if source["class_path"].endswith("FileSource"):
        for split in source["init_args"]:
            overrides += [f"--data.source.{split}", thumbs if path.stem == "thumbs" else votes]
    if source["class_path"].endswith("StyleCorpus"):
        overrides += ["--data.source.num_rows", 200]
    if content["data"].get("chat_template"):
        overrides += ["--data.chat_template", "false"]  # the small model has none
    main(["fit", "--config", *map(str, [path, *overrides])])


@pytest.mark.parametrize("path", OVERRIDES, ids=lambda p: p.name)
def test_an_override_is_about_the_trainer_only(path):
    assert yaml.safe_load(path.read_text()).keys() == {"trainer"}
