"""Training on thumbs: the objective, the estimate of KTO's reference point, metrics, checkpoints."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
from counting_policy import CountingPolicy
from interrupted_runs import Crash
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule, UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BCOUnpairedLoss, DPOLoss, KTOLoss
from prlhf_lightning.policies import LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt, UserTable
from prlhf_lightning.types import PreferenceBatch, Tokens
from prlhf_lightning.user_models import IndividualUserModel

COMPLETIONS = [[5, 6, 2], [7, 2], [8, 9, 10, 2], [5, 6, 2]]  # the first and the last are the same, judged differently
UP = torch.tensor([True, False, True, False])


def make(model_path, loss=None, **settings):
    policy = CountingPolicy(model_path, lora=LoRA(rank=2))
    optim = Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0)
    return PersonalizedLM(IndividualUserModel(2), policy, loss or KTOLoss(), optim=optim, **settings)


@pytest.fixture
def module(model_path):
    """A module whose policy and users differ from the reference."""
    module = make(model_path, KTOLoss(0.7, 1.5, 0.5), alpha=0.3)
    module.vocabulary = UserVocabulary(["ann", "bob"])
    module.configure_model()
    for name, param in module.named_parameters():
        if "lora_B" in name or name.endswith("offsets.weight"):
            torch.nn.init.normal_(param.data, std=0.1)
    module.user_model.offsets.weight.data[0] = 0
    return module.eval()


def batch_of(completions=COMPLETIONS, up=UP):
    nothing = [[]] * len(completions)
    liked, disliked = (
        [c if u == kind else [] for c, u in zip(completions, up.tolist(), strict=True)] for kind in (True, False)
    )
    parts = (Tokens.from_lists(rows) for rows in (nothing, [[1, 11]] * len(completions), liked, disliked))
    users = ("ann", "bob", "ann", "stranger")[: len(completions)]
    return PreferenceBatch(users, *parts, records=torch.arange(len(completions)))


def log_ratios(module, batch, generic):
    """Log-ratios of completions `[B]`, from scoring them as those of a pair."""
    as_pairs = replace(batch, chosen=batch.completion, rejected=batch.completion)
    loss, module.loss = module.loss, DPOLoss()
    (policy,), reference = module.log_probs(as_pairs, [generic]), module.reference_log_probs(as_pairs)
    module.loss = loss
    return (policy.chosen.sum - reference.chosen.sum).detach().double()


def test_a_rows_loss_mixes_its_user_and_the_generic_user(module):
    module.loss.shift.fill_(0.2)
    losses, terms = module.objective(batch_of())
    expected = []
    for generic in (False, True):
        distance = 0.7 * (log_ratios(module, batch_of(), generic) - 0.2)
        expected.append(torch.where(UP, 1.5 * torch.sigmoid(-distance), 0.5 * torch.sigmoid(distance)))
    assert [term.generic for term in terms] == [False, True]
    torch.testing.assert_close(losses.double(), 0.3 * expected[0] + 0.7 * expected[1], rtol=1e-5, atol=1e-6)


def test_a_rows_loss_does_not_depend_on_its_batch(module):
    module.train()
    together = module.objective(batch_of())[0]
    for row in range(4):
        module.loss.shift.zero_()
        alone = module.objective(batch_of(COMPLETIONS[row : row + 1], UP[row : row + 1]))
        if row in (0, 2):  # `batch_of` begins with ann
            torch.testing.assert_close(alone[0][0], together[row], rtol=1e-5, atol=1e-6)


def test_the_reference_point_is_the_mean_log_ratio_so_far(module):
    batch = batch_of()
    mixed = replace(batch_of([COMPLETIONS[i] for i in (3, 0, 1, 2)], UP[[3, 0, 1, 2]]), user_ids=batch.user_ids)
    expected = torch.stack([log_ratios(module, mixed, generic) for generic in (False, True)]).mean()
    module.objective(batch)
    assert module.loss.shift == 0  # not in evaluation
    module.loss.train()
    module.objective(batch)
    assert module.loss.shift.item() == pytest.approx(expected.item(), rel=1e-4)
    module.objective(batch_of(COMPLETIONS[:1], UP[:1]))  # a single row says nothing about it
    assert module.loss.pairs_seen == 4


def fit(module, thumbs, folder, *callbacks, checkpoint=None, epochs=2, validation=None, **settings):
    options = {"batch_size": 4, "validation_fraction": 0.25, "feedback": "thumbs", **settings}
    data = PreferenceDataModule(FileSource(thumbs, validation), module.policy.tokenizer, **options)
    given = [SaveOnInterrupt(), UserTable(), *callbacks]
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=given, num_sanity_val_steps=0)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize("make_loss", [KTOLoss, BCOUnpairedLoss])
def test_a_run_that_crashed_goes_on_to_the_same_weights(model_path, thumbs, tmp_path, make_loss):
    torch.manual_seed(0)
    straight = make(model_path, make_loss())
    fit(straight, thumbs, tmp_path / "straight")
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="crash"):
        fit(make(model_path, make_loss()), thumbs, tmp_path / "crashed", Crash(7))
    resumed = make(model_path, make_loss())
    fit(resumed, thumbs, tmp_path / "resumed", checkpoint=tmp_path / "crashed/checkpoints/interrupted.ckpt")
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert straight.loss.pairs_seen > 0


def test_it_learns_that_users_like_opposites_and_how_well(model_path, tmp_path):
    with (tmp_path / "opposed.jsonl").open("w") as file:
        for number, text in enumerate(["red", "blue sun", "moon", "cat ran fast", "dog", "hello the sun"] * 2):
            for user, likes_even in (("ann", True), ("bob", False)):
                row = {"user_id": user, "prompt": f"{text} likes", "completion": text}
                file.write(json.dumps(row | {"label": (number % 2 == 0) == likes_even}) + "\n")
    module = make(model_path, KTOLoss(beta=0.5), alpha=0.8)
    opposed = tmp_path / "opposed.jsonl"
    metrics = fit(module, opposed, tmp_path, epochs=10, validation=opposed).callback_metrics
    assert {"val/seen/auc", "val/seen/auc_user_mean", "val/seen/generic_auc", "val/seen/reward_gap"} <= set(metrics)
    assert metrics["val/seen/auc"] > 0.9
    assert metrics["val/seen/generic_auc"] == pytest.approx(0.5)  # of one reward for both, as much is wrong as right
    with (tmp_path / "users_seen.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["user_id", "ups", "downs", "auc", "gap"]
    assert [(row["user_id"], row["ups"], row["downs"]) for row in rows] == [("ann", "6", "6"), ("bob", "6", "6")]


def test_the_reference_scores_each_completion_once(model_path, thumbs, tmp_path):
    for expected in (48, 0):
        module = make(model_path, BCOUnpairedLoss())
        fit(module, thumbs, tmp_path, epochs=3)
        assert module.policy.scored == expected


def test_one_term_a_row_can_be_drawn(model_path, thumbs, tmp_path):
    fit(make(model_path, sample_terms=True), thumbs, tmp_path, epochs=1)


def test_a_reference_point_is_not_asked_of_batches_of_one_row(model_path, thumbs, tmp_path):
    with pytest.raises(ConfigurationError, match=r"data\.batch_size is 1: set it to 2 or more"):
        fit(make(model_path, KTOLoss()), thumbs, tmp_path, batch_size=1)


@pytest.mark.parametrize(("loss", "feedback"), [(KTOLoss, "pairs"), (DPOLoss, "thumbs")])
def test_a_loss_refuses_data_of_another_kind(model_path, votes, thumbs, tmp_path, loss, feedback):
    with pytest.raises(ConfigurationError, match=f"{loss.__name__} takes .*give it feedback="):
        fit(make(model_path, loss()), thumbs if feedback == "thumbs" else votes, tmp_path, feedback=feedback)
