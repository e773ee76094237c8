"""What the policy says to a folder that is not what it takes for a model."""

from __future__ import annotations

import warnings

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prlhf_lightning import CausalLMPolicy
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils import hub


def test_a_folder_of_adapters_is_refused(model_path, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers has renamed
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig()).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match="is an adapter, and the reference would not have it"):
            CausalLMPolicy(str(tmp_path)).build()


def test_a_folder_without_a_tokenizer_is_told_as_such(model_path, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"Cause: the folder holds no tokenizer \("):
        _ = CausalLMPolicy(str(tmp_path)).tokenizer


def test_a_mistyped_folder_is_reported_without_asking_the_hub(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="Cause: there is no such folder"):
        CausalLMPolicy("models/of/mine").build()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models").mkdir()

    def offline(*_: object, **__: object) -> None:
        raise OSError("away")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with (
        pytest.warns(UserWarning, match="There is no folder models/mine: looking for it on the hub"),
        pytest.raises(ConfigurationError, match="Cause: away"),
    ):
        CausalLMPolicy("models/mine").build()


def test_a_folder_in_the_home_folder_is_found(model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model_path)
    assert CausalLMPolicy("~/model").tokenizer.eos_token


def test_an_impossible_hub_name_is_reported_without_asking(monkeypatch, caplog):
    def offline(name: str, **_: object) -> None:
        asked.append(name)
        raise OSError("away")

    asked: list[str] = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    monkeypatch.setattr("prlhf_lightning.policies.loading.refuse_kernels", lambda *_, **__: None)  # asks as well
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigurationError, match="no such folder, and a name on the hub has an owner"):
        CausalLMPolicy("qwen3-0.6b").build()
    assert not asked
    for name in ("nobody/nothing", "nobody/nothing", "gpt2"):
        with pytest.raises(ConfigurationError, match="Cause: away"):
            CausalLMPolicy(name).build()
    assert asked == ["nobody/nothing", "nobody/nothing", "gpt2"]
    assert [line.partition(",")[0] for line in caplog.messages] == [
        "Asking the hub for nobody/nothing", "Asking the hub for gpt2",
    ]  # fmt: skip
