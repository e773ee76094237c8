"""The Bradley-Terry loss against TRL's RewardTrainer and a reference in float64."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BradleyTerryLoss


def trl_loss(chosen, rejected, margin=None):
    """The loss of TRL's RewardTrainer for given rewards."""
    trainer = pytest.importorskip("trl").RewardTrainer
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=accelerator,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    logits = torch.cat([chosen, rejected])[:, None]
    inputs = {} if margin is None else {"margin": margin}
    return trainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=logits), inputs)


@pytest.mark.parametrize("gap", [0.0, 0.7])
def test_the_mean_loss_is_that_of_trl(gap):
    chosen, rejected = 3 * torch.randn(2, 20)
    ours = BradleyTerryLoss(gap=gap).margin_loss(chosen - rejected).mean()
    assert torch.allclose(ours, trl_loss(chosen, rejected, torch.full((20,), gap)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_a_cross_entropy(smoothing):
    margin = 5 * torch.randn(20)
    expected = [
        (1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * math.log1p(math.exp(m)) for m in margin.tolist()
    ]
    found = BradleyTerryLoss(smoothing).margin_loss(margin)
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_a_negative_gap_is_refused():
    with pytest.raises(ConfigurationError, match="gap is -1"):
        BradleyTerryLoss(gap=-1.0)
