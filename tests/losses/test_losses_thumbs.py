"""KTO and BCO of thumbs: against TRL's KTO trainer, and against formulas in float64."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from loss_batches import random_mask, random_tokens

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BCOUnpairedLoss, KTOLoss
from prlhf_lightning.types import LogProbs, PairLogProbs

UP = torch.tensor([True, False, False, True, True])
MASK = random_mask(len(UP))
BETA, DESIRABLE, UNDESIRABLE = 0.7, 1.3, 0.6


def thumbs(tokens, mask=MASK, up=UP):
    """Rows of one completion each, liked where `up` says so."""
    return PairLogProbs(*(LogProbs(tokens * kind[:, None], mask & kind[:, None]) for kind in (up, ~up)))


@pytest.fixture
def scored():
    """Tokens of the policy (with a gradient) and of the reference."""
    return random_tokens(MASK, 1).requires_grad_(), random_tokens(MASK, 2)


def make(z_0=0.0, **settings):
    loss = KTOLoss(BETA, DESIRABLE, UNDESIRABLE, **settings).double().eval()
    loss.shift.fill_(z_0)
    return loss


def test_kto_has_the_value_and_gradient_of_trls_trainer(scored, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    from trl import KTOTrainer  # slow to import

    leaf, reference = scored
    tokens, mismatched = leaf * MASK, torch.tensor([0.5, -0.2, 0.9, 0.4, 0.1])  # log-ratios, whose mean is z_0
    with_prompt = torch.nn.functional.pad(MASK, (1, 0)).long()
    outputs = SimpleNamespace(log_probs=tokens, entropy=torch.zeros_like(tokens), mean_logits=torch.zeros_like(tokens))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        _compute_kl_logps=lambda model, batch: mismatched,
        precompute_ref_logps=True,
        calculate_KL=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=BETA,
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(with_prompt),
        "completion_mask": with_prompt,
        "label": UP,
        "ref_logps": reference.sum(-1),
        "ref_KL_logps": torch.zeros(len(UP)),
    }
    theirs = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    ours = make(mismatched.mean()).forward(thumbs(tokens), thumbs(reference)).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    (a,), (b,) = (torch.autograd.grad(value, leaf, retain_graph=True) for value in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("z_0", [0.0, 0.4, -0.3])
def test_each_row_has_the_value_of_the_formula(scored, z_0):
    policy, reference = scored
    output = make(z_0)(thumbs(policy), thumbs(reference))
    for row, up in enumerate(UP.tolist()):
        r = float((policy[row] - reference[row]).detach().sum())
        distance = BETA * (r - max(0.0, z_0))
        weight, side = (DESIRABLE, 1) if up else (UNDESIRABLE, -1)
        assert output.losses[row].item() == pytest.approx(weight * (1 - 1 / (1 + math.exp(-side * distance))))
        rewards = [float(output.chosen_rewards[row]), float(output.rejected_rewards[row])]
        assert rewards == pytest.approx([BETA * r, math.nan] if up else [math.nan, BETA * r], nan_ok=True)


@pytest.mark.parametrize("loss", [make(0.3, sft_weight=0.5), BCOUnpairedLoss(sft_weight=0.5).eval()])
def test_gradients_are_exact_and_a_row_has_none_from_another(scored, loss):
    policy, reference = scored
    torch.autograd.gradcheck(lambda tokens: loss(thumbs(tokens), thumbs(reference)).losses, policy)
    (gradient,) = torch.autograd.grad(loss(thumbs(policy), thumbs(reference)).losses[1], policy)
    assert gradient.isfinite().all()
    assert gradient[1].any()
    assert not gradient[[0, 2, 3, 4]].any()


def test_bco_classifies_rewards_around_their_running_mean(scored):
    policy, reference = scored
    loss = BCOUnpairedLoss(BETA)
    rewards = BETA * (policy - reference).detach().sum(-1)
    loss(thumbs(policy), thumbs(reference))  # judged by 0, and moves the mean
    assert loss.shift.item() == pytest.approx(rewards.mean().item(), rel=1e-5)
    signs = torch.where(UP, 1.0, -1.0)
    expected = -torch.log(torch.sigmoid(signs * (rewards - rewards.mean())))
    torch.testing.assert_close(loss(thumbs(policy), thumbs(reference)).losses, expected, rtol=1e-5, atol=1e-6)


def test_the_reference_point_follows_mismatches_and_is_saved():
    loss, restored = KTOLoss(), KTOLoss()
    loss.observe(torch.tensor([1.0, 3.0]))
    loss.observe(torch.empty(0))
    restored.load_state_dict(loss.state_dict())
    assert loss.shift.item() == restored.shift.item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ConfigurationError, match=f"{name} is -1"):
        KTOLoss(**{name: -1.0})
