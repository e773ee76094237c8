"""What is said of a training that is too short, learned nothing, or learned its pairs by heart."""

from __future__ import annotations

import sys

import pytest

from prlhf_lightning.cli.main import main
from prlhf_lightning.training.callbacks.learning import Outcome, more_steps, what_to_change

SETTINGS = {
    "model.optim.lr": 5e-5,
    "model.optim.user_lr": 5e-4,
    "model.loss.beta": 0.1,
    "trainer.max_epochs": 2,
    "trainer.accumulate_grad_batches": 4,
}


@pytest.mark.parametrize(
    ("batches", "epochs", "accumulate", "size", "says"),
    [
        (100, 2, 4, 8, ["takes 50 optimizer steps", "trainer.accumulate_grad_batches 2 (now 4)"]),
        (20, 2, 4, 8, ["takes 10 ", "accumulate_grad_batches 1 (now 4), trainer.max_epochs 5 (now 2)"]),
        (4, 3, 1, 8, ["takes 12 ", "max_epochs 10 (now 3), data.batch_size 3 (now 8)"]),
        (1, 10, 1, 1, ["takes 10 ", "more epochs, or give more data"]),
    ],
)
def test_few_steps_are_answered_by_settings_that_give_a_hundred(batches, epochs, accumulate, size, says):
    advice = more_steps(batches, epochs, accumulate, size)
    assert all(words in advice for words in says)


def test_a_hundred_steps_are_enough_and_fewer_are_not():
    assert more_steps(200, 2, 4, 8) is None
    assert more_steps(5, 1, 1, 8, max_steps=100) is None
    assert "trainer.max_steps to 100 or more (now 20)" in more_steps(5, -1, 1, 8, max_steps=20)


def test_a_model_that_learned_nothing_is_told_to_raise_rates():
    advice = what_to_change(Outcome(0.52, 0.002, 1000, 0.535, 212), SETTINGS)
    assert advice.startswith("The model learned next to nothing")
    assert "training pairs 0.52 and held-out pairs 0.54 (0.50 is chance)" in advice
    assert "model.optim.lr 0.00025 (now 5e-05)" in advice
    assert "trainer.accumulate_grad_batches 1 (now 4)" in advice
    assert "shrink" not in advice


def test_after_few_steps_the_rates_are_not_judged():
    advice = what_to_change(Outcome(0.5, 0.0, 6, 0.5, 6, steps=3), SETTINGS)
    assert "after 3 optimizer steps. Train for 100 or more" in advice
    assert "model.optim.lr" not in advice


def test_few_pairs_ranked_right_by_luck_are_nothing_learned():
    assert what_to_change(Outcome(0.65, 0.01, 24, 0.56, 16), SETTINGS).startswith("The model learned next to nothing")
    assert what_to_change(Outcome(0.65, 0.01, 24, 0.8, 100), SETTINGS) is None


def test_a_model_that_moved_is_not_told_to_raise_rates():
    advice = what_to_change(Outcome(0.51, -4.0, 1000, 0.49, 212), SETTINGS | {"model.optim.lr": 1e-2})
    assert "lower rates" in advice


def test_a_model_that_ranks_only_its_training_pairs_overfits():
    outcome = Outcome(0.97, 3.0, 1000, 0.62, 400, {100: 0.64, 200: 0.66, 300: 0.9})
    advice = what_to_change(outcome, SETTINGS)
    assert advice.startswith("The model overfits")
    assert "lowest at step 100 (0.640), and is 0.900" in advice
    assert "half of model.optim.user_lr (0.0005)" in advice


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(0.85, 1.0, 1000, 0.81, 212),
        Outcome(0.56, 0.1, 1000, 0.60, 2000),  # a little, on many pairs: it is real
        Outcome(None, None, 0, 0.7, 100),  # thumbs
        Outcome(),
    ],
)
def test_a_model_that_learned_is_left_alone(outcome):
    assert what_to_change(outcome, SETTINGS) is None


def test_a_run_warns_of_few_steps_and_ends_with_what_to_change(model_path, votes, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    command = [
        "fit", "--model.policy", "CausalLMPolicy", "--model.policy.model", model_path, "--model.loss", "DPOLoss",
        "--model.user_model", "IndividualUserModel", "--data.source", "FileSource", "--data.source.train", str(votes),
        "--model.optim.lr", "1e-9", "--model.optim.user_lr", "1e-9", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.log_every_n_steps", "1",
        "--trainer.enable_progress_bar", "false", "--collapse.prompts", "0", "--data.validation_fraction", "0.2",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"Training takes \d+ optimizer steps; below about 100"):
        main(command)
    (advice,) = [line for line in caplog.messages if line.startswith("The model learned next to nothing")]
    assert "Train for 100 or more before changing the rates" in advice
    assert not [line for line in caplog.messages if "prlhf-lightning shrink" in line]
