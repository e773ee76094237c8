"""SIGTERM and Ctrl+C end training between two steps, and leave a checkpoint to go on from."""

from __future__ import annotations

import os
import signal

import interrupted_runs
import pytest
import torch
from lightning.pytorch import Callback

from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.callbacks import StopOnSignal


class Kill(Callback):
    """Sends a signal while a batch is being trained or validated on."""

    def __init__(self, number: int, batch: int | None = None, validation: int | None = None) -> None:
        self.number, self.batch, self.validation, self.logged = number, batch, validation, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + trainer.current_epoch * trainer.num_training_batches == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == self.validation and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, module) -> None:
        self.logged.append({name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")})


def fit(model_path, votes, folder, *callbacks: Callback, **options) -> PersonalizedLM:
    return interrupted_runs.fit(
        model_path, votes, folder, StopOnSignal(), *callbacks, num_sanity_val_steps=0, **options
    )


@pytest.fixture
def handlers():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("kill", "accumulate", "step"),
    [
        (Kill(signal.SIGTERM, 2), 1, 3),
        (Kill(signal.SIGINT, 2), 1, 3),
        (Kill(signal.SIGTERM, 0), 4, 1),  # goes on to the end of the step
        (Kill(signal.SIGTERM, 9), 4, 3),  # the last batch of an epoch completes a step of two
        (Kill(signal.SIGTERM, 13), 1, 14),
        (Kill(signal.SIGTERM, validation=1), 1, 10),
    ],
)
def test_a_run_told_to_stop_resumes_to_the_same_weights(model_path, votes, tmp_path, capfd, kill, accumulate, step):
    options = {"accumulate_grad_batches": accumulate}
    straight = fit(model_path, votes, tmp_path / "straight", watch := Kill(0), **options)
    with pytest.raises(SystemExit) as stop:
        fit(model_path, votes, tmp_path / "told", kill, **options)
    assert stop.value.code == 128 + kill.number
    assert "stopping after this step" in capfd.readouterr().err
    checkpoint = tmp_path / "told/checkpoints/interrupted.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    resumed = fit(model_path, votes, tmp_path / "resumed", again := Kill(0), checkpoint=checkpoint, **options)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (kill.logged + again.logged)[-2:] == watch.logged  # a validation that was broken off is made in full


class Twice(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_stops_at_once(model_path, votes, tmp_path):
    with pytest.raises(SystemExit) as stop:
        fit(model_path, votes, tmp_path, Twice())
    assert stop.value.code == 1
    assert torch.load(tmp_path / "checkpoints/interrupted.ckpt", weights_only=True)["global_step"] == 2
