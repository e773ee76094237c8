import inspect
import io
from contextlib import redirect_stdout

import pytest
import torch
from jsonargparse import ArgumentParser
from loss_batches import one_token_pairs, random_batch

from prlhf_lightning import losses as L
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import LogProbs, PairLogProbs

CLASSES = [
    loss
    for loss in vars(L).values()
    if isinstance(loss, type) and issubclass(loss, L.PreferenceLoss) and not inspect.isabstract(loss)
]


def paths(loss_class):
    return f"prlhf_lightning.losses.{loss_class.__name__}"


@pytest.mark.parametrize("loss_class", CLASSES)
def test_jsonargparse_builds_each_loss_from_its_class_path(loss_class):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.PreferenceLoss, "loss")
    config = parser.parse_object({"loss": {"class_path": paths(loss_class)}})
    assert isinstance(parser.instantiate(config).loss, loss_class)


@pytest.mark.parametrize("loss_class", CLASSES)
def test_help_explains_every_argument(loss_class):
    parser = ArgumentParser()
    parser.add_class_arguments(loss_class, "loss")
    out = io.StringIO()
    with redirect_stdout(out):
        parser.print_help()
    for argument in (action for action in parser._actions if action.dest.startswith("loss.")):
        assert argument.help, f"{loss_class.__name__}: {argument.dest} is not explained"
    assert ("--loss.beta" in out.getvalue()) == (loss_class not in (L.SFTLoss, L.BradleyTerryLoss))


@pytest.mark.parametrize(
    ("loss_class", "settings", "field"),
    [
        (L.DPOLoss, {"beta": 0.0}, "beta"),
        (L.DPOLoss, {"beta": float("nan")}, "beta"),
        (L.HingeLoss, {"sft_weight": -0.1}, "sft_weight"),
        (L.DPOLoss, {"label_smoothing": 0.5}, "label_smoothing"),
        (L.AOTLoss, {"label_smoothing": -0.1}, "label_smoothing"),
        (L.RobustLoss, {"label_smoothing": 0.5}, "label_smoothing"),
        (L.EXOLoss, {"label_smoothing": 0.0}, "label_smoothing"),
        (L.DiscoPOPLoss, {"tau": 0.0}, "tau"),
        (L.SimPOLoss, {"gamma": -1.0}, "gamma"),
        (L.BCOLoss, {"window": 0}, "window"),
    ],
)
def test_impossible_settings_are_refused_by_name(loss_class, settings, field):
    with pytest.raises(ConfigurationError, match=f"{loss_class.__name__}: {field}"):
        loss_class(**settings)


def test_a_missing_reference_is_refused():
    _, policy, _ = random_batch(2)
    with pytest.raises(ConfigurationError, match="DPOLoss compares the policy with a reference"):
        L.DPOLoss()(policy)


@pytest.mark.parametrize("loss_class", [L.SimPOLoss, L.ORPOLoss, L.CPOLoss, L.SFTLoss])
def test_reference_free_losses_ignore_a_reference(loss_class):
    _, policy, reference = random_batch(2)
    assert not loss_class.requires_reference
    with_reference, without = loss_class()(policy, reference), loss_class()(policy)
    torch.testing.assert_close(with_reference.losses, without.losses)
    torch.testing.assert_close(with_reference.chosen_rewards, without.chosen_rewards)


def supervised(n):
    empty = LogProbs(torch.zeros(n, 0), torch.zeros(n, 0, dtype=torch.bool))
    return PairLogProbs(one_token_pairs([-2.0] * n, [0.0] * n).chosen, empty)


def test_sft_needs_no_rejected_completions():
    out = L.SFTLoss()(supervised(3))
    assert out.losses.tolist() == [2.0] * 3
    assert out.rejected_rewards.isnan().all()


def test_pair_losses_refuse_batches_without_rejected_answers():
    with pytest.raises(ConfigurationError, match="no rejected ones"):
        L.SimPOLoss()(supervised(3))


def test_a_new_loss_is_one_method():
    class SquaredHingeLoss(L.MarginLoss):
        def margin_loss(self, margin):
            return (1 - margin).relu() ** 2

    policy, zero = one_token_pairs([-1.0], [-3.0]), one_token_pairs([0.0], [0.0])
    assert SquaredHingeLoss(beta=0.25)(policy, zero).losses.item() == 0.25


def test_a_loss_that_averages_its_pairs_is_refused():
    class Averaged(L.MarginLoss):
        def margin_loss(self, margin):
            return (1 - margin).clamp(min=0).mean()

    with pytest.raises(ConfigurationError, match=r"Averaged returned a loss of shape \[\] for \d+ pairs; return one"):
        Averaged()(*random_batch(4)[1:])
