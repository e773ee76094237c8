"""Every configuration that is shipped trains for a step, on a small model and small files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import CHAT_TEMPLATE, make_tokenizer
from original_files import comparisons, write_jsonl, write_koala, write_prism, write_psoups

from prlhf_lightning.cli.main import main

CONFIGS = Path(__file__).parent.parent / "configs"


def original_files(source: str, folder: Path) -> list[object]:
    """Return the options that have a source of the paper's data read small files of their schema."""
    if source == "TLDRSource":
        rows = comparisons({f"w{i}": 2 for i in range(12)})
        held_out = comparisons({f"w{i}": 1 for i in range(12)}, "valid1", 500)
        return ["--data.source.files", write_jsonl(folder / "batch3.json", rows + held_out)]
    if source == "PersonalizedSoupsSource":
        koala = write_koala(folder / "koala_eval_50.json")
        return ["--data.source.folder", write_psoups(folder), "--data.source.koala", koala]
    return ["--data.source.folder", write_prism(folder)]


@pytest.fixture(scope="module")
def chat_model_path(model_path, tmp_path_factory) -> Path:
    """The small model, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(model_path, folder, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


OVERRIDES = sorted((CONFIGS / "overrides").glob("*.yaml"))  # of other configurations; test_sharded.py trains with them


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.rglob("*.yaml")} - {*OVERRIDES}), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_config_trains_a_step(path, votes, thumbs, model_path, chat_model_path, tmp_path):
    content = yaml.safe_load(path.read_text())
    overrides = ["--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false", "--trainer.accelerator",
                 "cpu", "--trainer.default_root_dir", tmp_path]  # fmt: skip
    if "policy" in content["model"] and "rewards" not in content["model"]:
        overrides += ["--train_baseline", "false", "--collapse.prompts", 1, "--data.eval_batch_size", 4]
    source = content["data"]["source"]
    policy = content["model"].get("policy")
    if policy and not policy["init_args"]["model"].startswith("builtin:"):
        model = chat_model_path if source["class_path"].endswith("PRISMSource") else model_path
        overrides += ["--model.policy.model", model, "--model.policy.dtype", "float32"]
    if path.parent.name == "paper":
        overrides += original_files(source["class_path"].rpartition(".")[2], tmp_path)
    if source["class_path"].endswith("FileSource"):
        for split in source["init_args"]:
            overrides += [f"--data.source.{split}", thumbs if path.stem == "thumbs" else votes]
    if source["class_path"].endswith("StyleCorpus"):
        overrides += ["--data.source.num_rows", 200]
    if source["class_path"].endswith("SimulatedSource"):  # it is drawing the pairs that takes time
        overrides += ["--data.source.pairs_per_user", 15, "--data.source.validation_pairs_per_user", 5]
    if content["data"].get("chat_template"):
        overrides += ["--data.chat_template", "false"]  # the small model has none
    main(["fit", "--config", *map(str, [path, *overrides])])


@pytest.mark.parametrize("path", OVERRIDES, ids=lambda p: p.name)
def test_an_override_is_about_the_trainer_only(path):
    assert yaml.safe_load(path.read_text()).keys() == {"trainer"}
