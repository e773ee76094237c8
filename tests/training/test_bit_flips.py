"""Damage that no file's own format shows is told: settings of a base model, shipped files, a run's configuration."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from prlhf_lightning.cli.earlier_runs import configuration_of_run, tell_of_changes
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, causal_lm
from prlhf_lightning.policies.loading import warning_of_other_base
from prlhf_lightning.reports.html import Page
from prlhf_lightning.training.checkpointing import base_of
from prlhf_lightning.utils import shipped
from prlhf_lightning.utils.config_checksum import add_checksum, check_configuration
from prlhf_lightning.utils.hashing import check_folder, with_checksums


def replace_in(path: Path, old: str, new: str) -> None:
    """Change a text that stands in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def identity(folder: Path) -> dict[str, str]:
    policy = CausalLMPolicy(str(folder), lora=None)
    policy.build(with_reference=False)
    return base_of(policy)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": 3'),
        ("tokenizer.json", '"cat": ', '"cau": '),
    ],
)
def test_equal_weights_in_another_base_file_are_told_by_name(model_path, tmp_path, file, old, new):
    folder = Path(shutil.copytree(model_path, tmp_path / "base"))
    before = identity(folder)
    assert warning_of_other_base(before, identity(folder), "base") is None
    replace_in(folder / file, old, new)
    assert f"another {file.removesuffix('.json') if 'token' in file else file}" in str(
        warning_of_other_base(before, identity(folder), "base")
    )


def test_harmless_settings_of_a_base_model_are_not_reported(model_path, tmp_path):
    folder = Path(shutil.copytree(model_path, tmp_path / "base"))
    before = identity(folder)
    replace_in(folder / "config.json", '"use_cache": true', '"use_cache": false')
    replace_in(folder / "config.json", '"transformers_version": "', '"transformers_version": "4.')
    assert warning_of_other_base(before, identity(folder), "base") is None


def test_identities_of_other_versions_are_not_compared_by_files(model_path):
    now = identity(Path(model_path))
    earlier = {name: now[name] for name in ("weights", "transformers", "dtype", "sample")}
    assert warning_of_other_base(earlier, now, "base") is None
    assert warning_of_other_base({**now, "config": "", "transformers": "5.0"}, now, "base") is None


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A copy of the shipped files, in their place."""
    folder = shutil.copytree(shipped.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(shipped, "ASSETS", folder)
    monkeypatch.setattr(causal_lm, "ASSETS", folder)
    monkeypatch.setattr("prlhf_lightning.reports.html._TEMPLATE", folder / "page.html.jinja")
    return folder


def test_the_sums_are_those_of_the_files_that_are_shipped():
    assert json.loads((shipped.ASSETS / "sha256.json").read_text()) == shipped.sums_of()


@pytest.mark.parametrize("name", ["style-lm/model.safetensors", "style-lm/config.json", "sha256.json"])
def test_a_shipped_model_that_is_damaged_is_refused_by_name(assets, name):
    raw = bytearray((assets / name).read_bytes())
    raw[-20 if name.endswith("safetensors") else 3] ^= 1
    (assets / name).write_bytes(raw)
    with pytest.raises(ConfigurationError, match=f"{name} is not as it came with the package.*install"):
        CausalLMPolicy("builtin:style-lm").build()


def test_a_template_of_pages_that_is_damaged_is_refused_by_name(assets):
    replace_in(assets / "page.html.jinja", "<body", "<bodx")
    with pytest.raises(ConfigurationError, match=r"page.html.jinja is not as it came with the package"):
        Page("A page", "").render()


@pytest.fixture
def configuration(tmp_path):
    path = tmp_path / "run/config.yaml"
    path.parent.mkdir()
    path.write_text("data:\n  batch_size: 8\n")
    (path.parent / "checkpoints").mkdir()
    (path.parent / "checkpoints/last.ckpt").touch()
    add_checksum(path)
    return path


def test_a_damaged_run_configuration_measures_no_checkpoint(configuration):
    words = ["validate", "--ckpt_path", str(configuration.parent / "checkpoints/last.ckpt")]
    assert configuration_of_run(words, "runs") == configuration
    replace_in(configuration, "8", "9")
    with pytest.raises(ConfigurationError, match=r"config.yaml was changed or damaged.*delete its first line"):
        configuration_of_run(words, "runs")
    configuration.write_bytes(configuration.read_bytes().partition(b"\n")[2])
    check_configuration(configuration)


def test_a_changed_configuration_that_is_named_is_told_of(configuration):
    tell_of_changes(["fit", "--config", str(configuration)])  # warnings would be errors
    configuration.write_bytes(configuration.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=r"config.yaml was changed or damaged"):
        tell_of_changes(["fit", "--config", str(configuration)])


@pytest.mark.parametrize(
    ("content", "says"), [(b"a: 1\nb: \xff", ":2: is not UTF-8 text"), (b"a: \0", "has zero bytes")]
)
def test_a_configuration_that_is_no_text_is_refused(tmp_path, content, says):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=says):
        tell_of_changes(["fit", f"--config={tmp_path / 'mine.yaml'}"])


@pytest.fixture
def exported(tmp_path):
    """A folder with the files that an export has checksums of."""
    folder = tmp_path / "exported"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "users.json", "additional_chat_templates/tools.jinja"):
        (folder / name).write_text("{}")
    (folder / "prlhf.json").write_text(json.dumps(with_checksums(folder, {"format": 2})))
    check_folder(folder)
    return folder


@pytest.mark.parametrize("name", ["additional_chat_templates/tools.jinja", "users.json", "prlhf.json"])
def test_a_file_of_an_exported_folder_that_is_damaged_is_named(exported, name):
    replace_in(exported / name, "{", "[")
    with pytest.raises(ConfigurationError, match=f"{name} is not as it was exported"):
        check_folder(exported)


def test_a_file_added_to_an_exported_folder_is_refused(exported):
    (exported / "notes.txt").write_text("mine")
    check_folder(exported)
    (exported / "chat_template.jinja").write_text("")
    with pytest.raises(ConfigurationError, match=r"chat_template.jinja is not as it was exported"):
        check_folder(exported)


def test_an_exported_model_is_checked_before_further_training(model_path, tmp_path):
    folder = Path(shutil.copytree(model_path, tmp_path / "base"))
    (folder / "prlhf.json").write_text(json.dumps(with_checksums(folder, {"format": 2})))
    CausalLMPolicy(str(folder)).build()
    replace_in(folder / "config.json", "1e-06", "1e-05")
    for opens in (lambda policy: policy.build(), lambda policy: policy.tokenizer):
        with pytest.raises(ConfigurationError, match=r"policy.model: .*config.json is not as it was exported"):
            opens(CausalLMPolicy(str(folder)))


@pytest.fixture
def benchmark(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    yield importlib.import_module("bit_flips")
    for name in ("bit_flips", "fuzz_checkpoint"):
        sys.modules.pop(name, None)


def test_the_benchmark_tells_silent_from_refused_and_crashing(benchmark, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("silent", "checked", "trace", "unread"):
        (folder / name).write_bytes(b"content")

    def opened() -> str:
        assert (folder / "trace").read_bytes() == b"content"
        if (folder / "checked").read_bytes() != b"content":
            raise ConfigurationError(f"{folder / 'checked'} is damaged")
        return str((folder / "silent").read_bytes())

    found = list(benchmark.trials("files", benchmark.Kind(folder, opened), 40, 0))
    outcomes = {"silent": "silent", "checked": "refused", "trace": "trace", "unread": "harmless"}
    assert len(found) >= 40
    assert {(trial.file, trial.outcome) for trial in found} == set(outcomes.items())
    assert opened() == str(b"content")
