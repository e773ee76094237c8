from io import StringIO

import torch

from prlhf_lightning.metrics import UserAccuracy, UserAUC
from prlhf_lightning.reports.evaluation_table import evaluation_table
from prlhf_lightning.utils.terminal import plain_console


def printed(table):
    out = StringIO()
    plain_console(file=out, width=100).print(table)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_pairs_are_counted_and_accuracies_have_user_intervals():
    rows = [("ann", UserAccuracy(1, 30, 0.9, 0, 1, 0)), ("[/]", UserAccuracy(2, 10, 0.5, 0, 1, 0))]
    metrics = {"val/seen/loss": torch.tensor(0.25), "val/seen/generic_accuracy": torch.tensor(0.5)}
    said = printed(evaluation_table(metrics, {"seen": rows}, ["seen", "unseen"], "val"))
    assert "seen users unseen users" in said
    assert "users 2" in said
    assert "pairs 40" in said
    # (30 * 0.9 + 10 * 0.5) / 40, and drawing users again gives ann twice, or the other twice
    assert "pair accuracy 0.800 [0.500, 0.900]" in said
    assert "mean over users 0.700 [0.500, 0.900]" in said
    assert "same pairs, generic user 0.5000" in said
    assert "loss 0.2500" in said


def test_one_user_has_no_interval_and_sft_has_only_a_loss():
    said = printed(evaluation_table({}, {"seen": [("ann", UserAUC(1, 3, 2, 0.75, 0))]}, ["seen"], "test"))
    assert {"Test", "users 1", "thumbs up, down 3, 2", "AUC of thumbs, mean over users 0.750"} <= set(said)
    said = printed(evaluation_table({"val/seen/loss": torch.tensor(2.0)}, {}, ["seen"], "val"))
    assert "loss 2.0000" in said
