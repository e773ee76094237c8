"""Odd files that stand for a kind each; `benchmarks/fuzz_files.py` opens thousands with every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_votes
from short_runs import fit, run_config

from prlhf_lightning.cli.export import export
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.inference.folder import read_folder
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.utils.load_errors import opening

TABLE = "user_model.offsets.weight"


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What a checkpoint of `fit` holds, and its folder export."""
    folder = tmp_path_factory.mktemp("trained")
    votes = write_votes(folder / "votes.jsonl", {"ann": 6, "bob": 6})
    content = run_config(folder, {"model": model_path, "lora": {"rank": 2}}, votes, trainer={"max_steps": 1})
    checkpoint = fit(folder, content)
    export(checkpoint, folder / "exported")
    return checkpoint_files.load(checkpoint), folder / "exported"


def changed(content: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """Return a tree with another value in one place."""
    first, *rest = path
    return {**content, first: changed(content[first], *rest, to=to) if rest else to}


LORA = ("hyper_parameters", "policy", "init_args", "lora")
CHECKPOINTS = {
    "a rank of 100,000": ((*LORA, "rank"), 100_000, "policy.lora.rank is 100000, and its adapters have rank 2"),
    "a table of 10^12 numbers that are one": (
        ("state_dict", TABLE), torch.zeros(1).expand(10**6, 10**6), "the file holds fewer numbers"
    ),
    "soft prompts of 10^12 tokens": (
        ("hyper_parameters", "user_model", "init_args", "num_tokens"), 10**12, "num_tokens"
    ),
    "NaN in a table": (("state_dict", TABLE), torch.full((3, 64), torch.nan), "infinite or NaN"),
    "a weight that is a text": (("state_dict", TABLE), "x", "is no Tensor"),
    "settings that are a list": (("hyper_parameters",), [1], "hyper_parameters is of type list"),
    "a class that is a number": (("hyper_parameters", "loss"), 7, "loss is of type int"),
    "a user less": (("prlhf_lightning", "users"), ["ann"], "another number of users"),
    "optimizers that are a number": (("optimizer_states",), 3.5, "optimizer_states is of type float"),
    "an argument of another type": ((*LORA, "alpha"), {"": None}, "can't be used"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_an_odd_checkpoint_is_refused_by_its_name_and_its_part(trained, tmp_path, path, value, said):
    checkpoint_files.save(changed(trained[0], *path, to=value), file := tmp_path / "odd.ckpt")
    with pytest.raises(PRLHFError, match=r"odd\.ckpt") as raised:
        load_module(file, "model")
    assert said in str(raised.value)


def test_the_checkpoint_that_they_are_made_of_loads(trained, tmp_path):
    checkpoint_files.save(trained[0], file := tmp_path / "sound.ckpt")
    assert load_module(file, "model").vocabulary == UserVocabulary(["ann", "bob"])


SETTINGS = {
    "soft prompts of 10^12 tokens": (("user_model", "init_args", "num_tokens"), 10**12, "by the settings"),
    "a user model that is a list": (("user_model",), [None], "can't be used"),
    "a length that is a text": (("tokenization", "max_prompt_length"), "x", "max_prompt_length is of type str"),
    "a format that is a list": (("format",), [2], "format is"),
}


@pytest.mark.parametrize(("path", "value", "said"), SETTINGS.values(), ids=SETTINGS)
def test_odd_settings_of_an_exported_folder_are_refused(trained, path, value, said):
    file = trained[1] / "prlhf.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**changed(json.loads(before), *path, to=value), "sha256": None}))
        with pytest.raises(ConfigurationError, match="exported") as raised:
            read_folder(trained[1])
    finally:
        file.write_text(before)
    assert said in str(raised.value)


def test_lists_within_lists_without_end_are_refused(tmp_path):
    (tmp_path / "prlhf.json").write_text("[" * 100_000)
    with pytest.raises(ConfigurationError, match="cannot be read as JSON"):
        read_folder(tmp_path)


def test_a_library_panic_names_the_file_and_ctrl_c_does_not():
    class Panic(BaseException):
        """As those of Rust are."""

    said = r"a\.json can't be used: Panic: x\. Mend it\."
    with pytest.raises(ConfigurationError, match=said), opening("a.json", "Mend it."):
        raise Panic("x")
    with pytest.raises(KeyboardInterrupt), opening("a.json", "Mend it."):
        raise KeyboardInterrupt
