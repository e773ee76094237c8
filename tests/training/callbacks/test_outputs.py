"""When an interrupted run leaves a checkpoint, and when it had better not."""

from __future__ import annotations

import pytest
import torch
from interrupted_runs import fit
from lightning.pytorch import Callback

from prlhf_lightning.training.callbacks.outputs import BestAndLast


class BreakInStep(Callback):
    """Has the third step fail when part of the weights have been changed."""

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step == 2:
            optimizer.param_groups[-1]["betas"] = "nonsense"


class Spoil(Callback):
    def on_train_batch_end(self, trainer, module, *args) -> None:
        if trainer.global_step == 2:
            next(p for p in module.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
            raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("callback", "says"), [(BreakInStep(), "in the middle of a step"), (Spoil(), "the weights are not finite")]
)
def test_weights_to_go_on_from_are_saved_and_no_others(model_path, votes, tmp_path, callback, says):
    with (
        pytest.warns(UserWarning, match=f"at step 2, and interrupted.ckpt was not written: .*{says}"),
        pytest.raises((ValueError, RuntimeError)) as error,
    ):
        fit(model_path, votes, tmp_path, callback)
    assert "interrupted" not in str(error.value)  # the error itself is not lost
    assert not (tmp_path / "checkpoints/interrupted.ckpt").exists()


class BreakValidation(Callback):
    """Has the validation after the first epoch fail in its second batch, and keeps what others logged."""

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.logged = fail, []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.fail == "start" and batch_idx == 1 and not trainer.sanity_checking:
            raise RuntimeError("stop")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self.fail == "end" and batch_idx == 1 and not trainer.sanity_checking:
            raise RuntimeError("stop")

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.logged.append(float(trainer.callback_metrics["val/seen/loss"]))


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_validation_that_failed_is_made_in_full(model_path, votes, tmp_path, where):
    straight = fit(model_path, votes, tmp_path / "straight", watch := BreakValidation())
    with pytest.raises(RuntimeError, match="stop"):
        fit(model_path, votes, tmp_path / "broken", BreakValidation(where))
    checkpoint = tmp_path / "broken/checkpoints/interrupted.ckpt"
    resumed = fit(model_path, votes, tmp_path / "resumed", again := BreakValidation(), checkpoint=checkpoint)
    assert again.logged == watch.logged
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


class Worsen(Callback):
    def on_validation_epoch_end(self, trainer, module) -> None:
        module.log("val/seen/worse", float(trainer.global_step))


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_last_is_of_the_last_step_though_validation_got_worse(model_path, votes, tmp_path, interval):
    keeper = BestAndLast(monitor="val/seen/worse")
    model = fit(model_path, votes, tmp_path, keeper, Worsen(), val_check_interval=interval)
    last, best = (torch.load(path, weights_only=True) for path in (keeper.last_model_path, keeper.best_model_path))
    assert best["global_step"] < last["global_step"] == model.trainer.global_step


@pytest.mark.parametrize(
    ("options", "steps", "every"),
    [({"max_epochs": 1}, 10, None), ({"max_steps": 5}, 5, None), ({"max_steps": 5}, 5, 100)],
)
def test_steps_after_the_last_validation_are_kept_and_resumed(model_path, votes, tmp_path, options, steps, every):
    settings = {"val_check_interval": 4, "schedule": "constant"}  # a constant one has no end to go by
    keeper = BestAndLast(every_n_train_steps=every)
    model = fit(model_path, votes, tmp_path / "part", keeper, **settings, **options)
    last, best = (torch.load(path, weights_only=True) for path in (keeper.last_model_path, keeper.best_model_path))
    assert best["global_step"] % 4 == 0
    assert last["global_step"] == model.trainer.global_step == steps
    resumed = fit(model_path, votes, tmp_path / "resumed", checkpoint=keeper.last_model_path, **settings)
    straight = fit(model_path, votes, tmp_path / "straight", **settings)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
