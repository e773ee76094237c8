"""A loss or a gradient that is not finite: no step is taken, the rows are named, the run can go on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from test_training import make, make_data, make_trainer

from prlhf_lightning.errors import NonFiniteError
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.training.callbacks.outputs import BestAndLast, SaveOnInterrupt


class Exploding(DPOLoss):
    """From the third batch on, multiplies by a factor the loss or the gradient of pairs whose rejected is longer."""

    def __init__(self, loss: float = 1.0, gradient: float = 1.0, at: int = 3) -> None:
        super().__init__()
        self.factors, self.at, self.calls = (loss, gradient), at, 0

    def pair_loss(self, policy, reference):
        losses = super().pair_loss(policy, reference)
        self.calls += self.training
        if self.calls <= 2 * (self.at - 1):  # two terms a batch
            return losses
        affected = policy.rejected.lengths > policy.chosen.lengths
        if losses.requires_grad:
            losses.register_hook(lambda grad: torch.where(affected, grad * self.factors[1], grad))
        return torch.where(affected, losses * self.factors[0], losses)


def fit(model_path, votes, tmp_path, loss, checkpoint=None, **kwargs):
    torch.manual_seed(0)
    module = make(model_path, loss=loss)
    trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=[SaveOnInterrupt()], **kwargs)
    trainer.fit(module, make_data(votes, model_path), ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_stops_before_the_step_and_names_the_rows(model_path, votes, tmp_path, what, accumulate):
    # In the third batch, and, where two make a step, hence in the second step.
    loss, kwargs = Exploding(**{what: float("nan")}), {"accumulate_grad_batches": accumulate}
    with pytest.raises(NonFiniteError, match=f"infinite or NaN after step {2 // accumulate}, from ") as error:
        fit(model_path, votes, tmp_path / "bad", loss, **kwargs)
    data = make_data(votes, model_path)
    order = data._training_batches(0, 1).order(0)[8 : 8 + 4 * accumulate]
    rows = data._prepared.division.train.split.rows(data._prepared.division.train.positions[order].tolist())
    bad = {
        f"{row['where']} (user '{row['user_id']}')" for row in rows if len(row["rejected_ids"]) > len(row["chosen_ids"])
    }
    assert len(bad) > 0
    named = str(error.value).partition("from ")[2].partition(". That")[0]
    assert {part.partition(" and ")[0] for part in named.split(", ")} <= bad
    assert min(3, len(bad)) == len(named.split(", "))


def test_training_resumes_from_the_state_before_the_bad_step(model_path, votes, tmp_path):
    with pytest.raises(NonFiniteError):
        fit(model_path, votes, tmp_path / "bad", Exploding(gradient=float("inf")))
    checkpoint = tmp_path / "bad/checkpoints/interrupted.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())
    straight = fit(model_path, votes, tmp_path / "straight", DPOLoss())
    resumed = fit(model_path, votes, tmp_path / "resumed", DPOLoss(), checkpoint)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_to_try_depends_on_the_settings(model_path, votes, tmp_path):
    with pytest.raises(NonFiniteError) as error:
        fit(model_path, votes, tmp_path, Exploding(loss=float("inf")), gradient_clip_val=None)
    assert "set trainer.gradient_clip_val" in str(error.value)
    assert "bfloat16" not in str(error.value)
    with pytest.raises(NonFiniteError) as error:
        fit(model_path, votes, tmp_path, Exploding(loss=float("inf")), precision="16-true")
    assert "set trainer.gradient_clip_val" not in str(error.value)
    assert "bfloat16" in str(error.value)


class Overflowing(Exploding):
    """An infinite gradient in one batch, as a scale of float16 that is too large gives."""

    def pair_loss(self, policy, reference):
        losses = super().pair_loss(policy, reference)
        if self.calls == 2 * self.at:
            self.at = 10**9
        return losses


def test_a_scaler_of_float16_gradients_may_skip_its_steps(model_path, votes, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = fit(model_path, votes, tmp_path, Overflowing(gradient=float("inf")), plugins=[precision], max_steps=6)
    assert scaler.get_scale() == 4.0  # halved once
    assert all(param.isfinite().all() for param in module.parameters())


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(model_path, votes, tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteError):
        fit(model_path, votes, tmp_path, Exploding(loss=float("nan")), plugins=[precision])


class Spoil(Callback):
    """Makes one number infinite in a step whose gradients were finite."""

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if trainer.global_step != self.step:
            return
        params = dict(module.named_parameters())
        param = next(
            p for name, p in params.items() if p.requires_grad and self.what.removeprefix("average of ") in name
        )
        target = trainer.optimizers[0].state[param]["exp_avg_sq"] if "average" in self.what else param.data
        target.view(-1)[-1] = float("inf")


@pytest.mark.parametrize(
    ("what", "saved"),
    [
        ("lora", "never"),
        ("generic", "at the end"),
        ("average of offsets", "by a validation"),
        ("average of lora", "at the end"),
    ],
)
def test_what_a_step_made_infinite_is_not_saved_and_is_an_error(model_path, votes, tmp_path, what, saved):
    validated = saved == "by a validation"
    callbacks = [Spoil(what, 4), *([BestAndLast(every_n_train_steps=3)] if saved != "never" else [])]
    trainer = make_trainer(
        tmp_path, limit_val_batches=1.0 if validated else 0, callbacks=callbacks, max_steps=4 + 2 * validated,
        val_check_interval=4 if validated else 1.0, enable_checkpointing=saved != "never",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"infinite or NaN by step 4, .*They are not saved.*earlier checkpoint"):
        trainer.fit(make(model_path), make_data(votes, model_path))
    kept = [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")]
    assert kept == ([3] if saved != "never" else [])


def test_the_users_whose_rows_are_infinite_are_named(model_path, votes, tmp_path):
    module = make(model_path)
    trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=[Spoil("offsets", 2)], max_steps=2)
    with pytest.raises(NonFiniteError, match=r"user_model\.\S+ \(user '(ann|bob|cy|dee)'\)"):
        trainer.fit(module, make_data(votes, model_path))


def test_a_checkpoint_that_is_not_finite_is_refused_on_load(model_path, votes, tmp_path):
    fit(model_path, votes, tmp_path, DPOLoss(), max_steps=2)
    module = make(model_path)
    trainer = make_trainer(tmp_path, limit_val_batches=0, max_steps=2)
    trainer.fit(module, make_data(votes, model_path))
    trainer.save_checkpoint(good := tmp_path / "good.ckpt")
    for part in ("state_dict", "optimizer_states"):
        content = torch.load(good, weights_only=True)
        state = content["optimizer_states"][0]["state"]
        tensor = next(iter(content["state_dict"].values())) if part == "state_dict" else state[0]["exp_avg"]
        tensor.view(-1)[0] = float("nan")
        torch.save(content, bad := tmp_path / "bad.ckpt")
        with pytest.raises(NonFiniteError, match=r"bad.ckpt has infinite or NaN values: .*earlier checkpoint"):
            make_trainer(tmp_path, max_steps=4).fit(make(model_path), make_data(votes, model_path), ckpt_path=bad)
