"""Training on a stream: resumed, with the reference's cache, and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_votes
from counting_policy import CountingPolicy
from interrupted_runs import Crash
from quiet_trainer import quiet_trainer

from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.user_models import IndividualUserModel


def fit(model_path, votes, folder, *callbacks, checkpoint=None, epochs=2, num_workers=0, **settings):
    torch.manual_seed(0)
    optim = Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0)
    policy = CountingPolicy(model_path, lora=LoRA(rank=2))
    module = PersonalizedLM(IndividualUserModel(2), policy, DPOLoss(), optim=optim, **settings)
    data = PreferenceDataModule(FileSource(str(votes)), model_path, batch_size=4, pairs_per_user=2, streaming=True,
                                shuffle_buffer=16, num_workers=num_workers)  # fmt: skip
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[SaveOnInterrupt(), *callbacks])
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 12 * epochs
    return module


@pytest.mark.parametrize(("step", "num_workers"), [(5, 0), (17, 2)])  # in the first epoch, and in the second
def test_a_run_that_crashed_goes_on_to_the_same_weights(model_path, votes, tmp_path, step, num_workers):
    straight = fit(model_path, votes, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="crash"):
        fit(model_path, votes, tmp_path / "crashed", Crash(step), num_workers=num_workers)
    checkpoint = tmp_path / "crashed/checkpoints/interrupted.ckpt"
    resumed = fit(model_path, votes, tmp_path / "resumed", checkpoint=checkpoint, num_workers=num_workers)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_reference_scores_a_completion_once_for_all_runs(model_path, votes, tmp_path):
    first = fit(model_path, votes, tmp_path, epochs=3)
    again = fit(model_path, votes, tmp_path, epochs=3)
    plain = fit(model_path, votes, tmp_path, epochs=3, cache_reference=False)
    assert (first.policy.scored, again.policy.scored, plain.policy.scored) == (2 * 48, 0, 3 * 2 * 48)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6, msg=name)


def test_the_command_trains_on_streams_and_validates_on_rows(votes, model_path, tmp_path):
    config = Path(__file__).parents[2] / "configs/p_dpo.yaml"
    validation = write_votes(tmp_path / "validation.jsonl", {"ann": 3, "stranger": 2}, seed=1)
    given = {
        "--data.source.train": votes, "--data.source.validation": validation, "--data.streaming": "true",
        "--data.unseen_user_fraction": 0, "--model.policy.model": model_path, "--model.policy.dtype": "float32",
        "--trainer.default_root_dir": tmp_path / "runs", "--trainer.max_epochs": 1, "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false", "--data.num_workers": 2,
    }  # fmt: skip
    main(["fit", "--config", str(config), *(str(word) for item in given.items() for word in item)])
    metrics = (tmp_path / "runs/version_0/metrics.csv").read_text()
    assert "val/seen/accuracy" in metrics
    assert "val/unseen/accuracy" in metrics
