"""A run's model, exported through the command line, is read by transformers alone."""

from __future__ import annotations

import sys

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf_lightning import CausalLMPolicy, DPOLoss, FileSource, IndividualUserModel, LoRA, PersonalizedLM
from prlhf_lightning.cli import main
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.types import Tokens


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])


def export(checkpoint, folder):
    main(["export", "--checkpoint", str(checkpoint), "--folder", str(folder)])


def fit(model_path, votes, folder, lora):
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder / "runs")
                },
                "model": {
                    "user_model": {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 2}},
                    "policy": {"class_path": "CausalLMPolicy", "init_args": {"model": model_path, "lora": lora}},
                    "loss": "DPOLoss",
                    "optim": {"lr": 0.05},
                },
                "data": {"source": {"class_path": "FileSource", "init_args": {"train": str(votes)}}},
            }
        )
    )  # fmt: skip
    main(["fit", "-c", str(path)])
    (checkpoint,) = (folder / "runs").glob("*/checkpoints/last.ckpt")
    return checkpoint


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_exported_model_is_the_trained_policy(model_paths, votes, tmp_path, name, lora):
    checkpoint = fit(model_paths[name], votes, tmp_path, lora)
    export(checkpoint, tmp_path / "exported")
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        scores = lm(ids).logits.log_softmax(-1)[0, [2, 3, 4], [7, 8, 2]]
        untrained = AutoModelForCausalLM.from_pretrained(model_paths[name])(ids).logits.log_softmax(-1)
    policy = PersonalizedLM.load_from_checkpoint(checkpoint, weights_only=True).policy
    (trained,) = policy.log_probs(Tokens.from_lists([[1, 5, 6]]), [Tokens.from_lists([[7, 8, 2]])])
    torch.testing.assert_close(scores, trained.tokens[0].detach(), rtol=1e-4, atol=1e-4)
    assert (scores - untrained[0, [2, 3, 4], [7, 8, 2]]).abs().max() > 1e-2
    assert lm.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("the cat").input_ids == [1, 5, 6]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: checkpoint: there is no checkpoint .*nothing.ckpt; [^\n]*$"):
        export(tmp_path / "nothing.ckpt", tmp_path / "exported")


def test_a_file_that_is_no_checkpoint_is_named(votes, tmp_path):
    with pytest.raises(SystemExit, match=r"votes.jsonl is damaged, or no checkpoint"):
        export(votes, tmp_path / "exported")


def test_a_checkpoint_of_a_module_built_in_code_says_how_to_load_it(model_path, votes, tmp_path):
    module = PersonalizedLM(IndividualUserModel(2), CausalLMPolicy(model_path, lora=LoRA(rank=2)), DPOLoss())
    data = PreferenceDataModule(FileSource(train=[str(votes)]), tokenizer=module.policy.tokenizer)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "built.ckpt", weights_only=False)
    with pytest.raises(SystemExit, match="built in code"):
        export(tmp_path / "built.ckpt", tmp_path / "exported")
