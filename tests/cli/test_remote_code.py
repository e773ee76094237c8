"""Code that comes with a base model runs where the command says so, and never because a file does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from short_runs import run_config, write_config
from transformers import dynamic_module_utils

from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import open_writer

CONFIG = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
MODEL = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
)


@pytest.fixture
def own_model(model_path, tmp_path, monkeypatch):
    """A model of a class that is in its folder."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = Path(shutil.copytree(model_path, tmp_path / "own"))
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": places}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command_decides_and_no_file_that_is_opened(own_model, votes, tmp_path):
    policy = {"model": str(own_model), "lora": {"rank": 2}, "trust_remote_code": True}
    config = write_config(tmp_path, run_config(tmp_path, policy, votes, collapse={"prompts": 0}))
    says = r"it comes with its own code; if you trust it, set trust_remote_code \(`--trust_remote_code true`\)"
    with pytest.raises(SystemExit, match=says):
        main(["fit", "-c", str(config), "--model.policy.trust_remote_code", "false"])
    main(["fit", "-c", str(config)])
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/last.ckpt")
    exported, trusted = tmp_path / "exported", ["--trust_remote_code", "true"]
    export = ["export", "--model", str(checkpoint), "--output", str(exported)]
    with pytest.raises(SystemExit, match=says):
        main(export)
    main([*export, *trusted])
    for model in (checkpoint, exported):
        with pytest.raises(SystemExit, match=says):
            main(["generate", "--model", str(model), "--prompt", "the cat"])
        main(["generate", "--model", str(model), "--prompt", "the cat", *trusted])
        assert type(open_writer(model, trust_remote_code=True).lm).__name__ == "OwnForCausalLM"
