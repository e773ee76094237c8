"""The monitor measures without a trace in training, and warns once for each cause."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import DPOLoss, SimPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks import CollapseMonitor
from prlhf_lightning.training.callbacks.collapse import measure
from prlhf_lightning.types import Tokens
from prlhf_lightning.user_models import IndividualUserModel

EOS = 2
NAMES = {"generated_length_ratio", "generated_repetition", "chosen_repetition", "generated_empty",
         "generated_log_ratio", "chosen_log_ratio"}  # fmt: skip


class Scripted(CausalLMPolicy):
    """Writes what it is told to, and draws random numbers while it does."""

    answer = (5, 6, 7, EOS)

    def generate(self, prompt, soft_prompt, sampling):
        torch.rand(3), np.random.rand(), random.random()
        assert sampling.temperature == 0
        return Tokens.from_lists([self.answer[: sampling.max_new_tokens]] * len(prompt))


class Broken(CausalLMPolicy):
    def generate(self, prompt, soft_prompt, sampling):
        raise NotImplementedError("writes nothing")


def fit(model_path, votes, tmp_path, *monitors, policy=CausalLMPolicy, loss=None, lr=1e-2, dropout=0.0, **kwargs):
    torch.manual_seed(0)
    module = PersonalizedLM(
        IndividualUserModel(2),
        policy(model_path, lora=LoRA(rank=2, dropout=dropout)),
        loss or DPOLoss(),
        optim=Optim(lr=lr, user_lr=lr, warmup_steps=0),
    )
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4, validation_fraction=0.2)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "val_check_interval": 0.5, "enable_checkpointing": False}
    trainer = quiet_trainer(tmp_path, callbacks=list(monitors), **{**options, **kwargs})
    trainer.fit(module, data)
    return module, data, trainer


def warnings_of(caught) -> list[str]:
    return [str(w.message) for w in caught if "collapse." in str(w.message)]


@pytest.mark.parametrize("policy", [CausalLMPolicy, Scripted])
def test_training_comes_to_the_same_weights_with_and_without(model_path, votes, tmp_path, policy):
    options = {"policy": policy, "dropout": 0.5}
    without, _, _ = fit(model_path, votes, tmp_path, **options)
    with_it, _, trainer = fit(model_path, votes, tmp_path, CollapseMonitor(), **options)
    assert {f"val/{name}" for name in NAMES} <= set(trainer.callback_metrics)
    assert with_it.training == without.training
    for (name, a), b in zip(without.named_parameters(), with_it.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_measured(model_path, votes, tmp_path):
    module, data, _ = fit(model_path, votes, tmp_path, policy=Scripted, max_steps=1)
    module.eval()
    batch = data.sample(4)
    assert len(batch) == 4
    lengths = batch.chosen.mask.sum(1).float()
    module.policy.answer = (5, 6, 7, 5, 6, 7, 5, 6, 7, EOS)  # seven 4-grams, four of them different
    values = measure(module, batch, 10)
    assert set(values) == NAMES
    assert values["generated_length_ratio"] == pytest.approx(10 / lengths.mean().item())
    assert values["generated_repetition"] == pytest.approx(3 / 7)
    assert values["generated_empty"] == 0
    assert values["chosen_repetition"] == 0
    own, generic = module.log_probs(batch, [False, True])
    assert not torch.equal(own.chosen.tokens, generic.chosen.tokens)
    expected = (own.chosen.mean - module.reference_log_probs(batch).chosen.mean).mean()
    assert values["chosen_log_ratio"] == pytest.approx(expected.item(), abs=1e-6)
    module.policy.answer = (EOS,)
    assert measure(module, batch, 10)["generated_empty"] == 1


def test_answers_and_chosen_completions_are_cut_alike(model_path, votes, tmp_path):
    module, data, _ = fit(model_path, votes, tmp_path, policy=Scripted, max_steps=1)
    module.policy.answer = (5,) * 1000
    assert measure(module.eval(), data.sample(4), 2)["generated_length_ratio"] == 1
    batch = data.sample(4)
    longest, mean = batch.chosen.ids.shape[1], batch.chosen.mask.sum(1).float().mean().item()
    assert measure(module, batch, 1000)["generated_length_ratio"] == pytest.approx(3 * longest / mean)


def test_without_a_reference_there_is_nothing_to_be_far_from(model_path, votes, tmp_path):
    module, data, trainer = fit(model_path, votes, tmp_path, CollapseMonitor(), loss=SimPOLoss(), max_steps=5)
    assert set(measure(module.eval(), data.sample(4), 5)) == {name for name in NAMES if "log_ratio" not in name}
    assert "val/generated_repetition" in trainer.callback_metrics


class Turning(Scripted):
    """Writes a good answer before training, and then another."""

    later: tuple[int, ...] = ()

    def generate(self, prompt, soft_prompt, sampling):
        written = super().generate(prompt, soft_prompt, sampling)
        self.answer = self.later
        return written


@pytest.mark.parametrize(
    ("later", "says"),
    [
        ((EOS,), "its answers are empty: val/generated_empty is 1.00 (before training 0.00), above the 0.10 that "
                 "collapse.empty allows"),
        ((EOS,), "its answers are short relative to the chosen ones: val/generated_length_ratio is"),
        ((5,) * 100, "its answers are long relative to the chosen ones: val/generated_length_ratio is"),
        ((5,) * 9 + (EOS,), "its answers repeat themselves: val/generated_repetition is 0.71 (before training 0.00), "
                            "above the 0.30 that collapse.repetition allows"),
    ],
)  # fmt: skip
def test_each_cause_is_told_once_with_evidence_and_advice(model_path, votes, tmp_path, later, says):
    policy = type("Later", (Turning,), {"later": later})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model_path, votes, tmp_path, CollapseMonitor(longest=2.0 if len(later) > 50 else None), policy=policy)
    (told, *others) = warnings_of(caught)
    causes = [told, *others]
    assert any(says in cause for cause in causes)
    assert len(causes) == len({cause.partition("collapse.")[2].split()[0] for cause in causes})  # each but once
    assert all("model.loss.sft_weight (now 0) of 0.3" in cause and "At step" in cause for cause in causes)


def test_what_was_no_better_before_training_does_not_count(model_path, votes, tmp_path):
    policy = type("Same", (Scripted,), {"answer": (5,) * 100})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model_path, votes, tmp_path, CollapseMonitor(), policy=policy, lr=1e-6)
    assert not warnings_of(caught)
    with pytest.warns(UserWarning, match="its answers are long"):  # nobody knows how it was before
        fit(model_path, votes, tmp_path, CollapseMonitor(), policy=policy, lr=1e-6, num_sanity_val_steps=0)


def test_chosen_completions_that_become_unlikely_are_reported(model_path, votes, tmp_path):
    with pytest.warns(
        UserWarning, match=r"train/chosen_log_ratio is -.* 3 readings in a row below the -0.50 that collapse.chosen_log"
    ):
        fit(model_path, votes, tmp_path, CollapseMonitor(prompts=0, chosen_log_ratio=-0.5), lr=0.2, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model_path, votes, tmp_path, CollapseMonitor(prompts=0, chosen_log_ratio=None), lr=0.2, max_epochs=3)
        fit(model_path, votes, tmp_path, CollapseMonitor(prompts=0), lr=1e-3)
    assert not warnings_of(caught)


def test_a_policy_that_fails_to_write_does_not_end_the_training(model_path, votes, tmp_path):
    with pytest.warns(UserWarning, match="generates no more answers.*writes nothing") as caught:
        _, _, trainer = fit(model_path, votes, tmp_path, CollapseMonitor(), policy=Broken)
    assert trainer.global_step == 10
    assert sum("generates no more answers" in str(w.message) for w in caught) == 1


def test_a_run_that_goes_on_remembers(model_path, votes, tmp_path):
    _, _, trainer = fit(model_path, votes, tmp_path, first := CollapseMonitor(), max_steps=3)
    assert set(first.state_dict()["before"]) == NAMES
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["CollapseMonitor"]
    second = CollapseMonitor()
    second.load_state_dict(saved)
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize(("name", "value"), [("prompts", -1), ("max_new_tokens", 0)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"collapse.{name} is {value}"):
        CollapseMonitor(**{name: value})
