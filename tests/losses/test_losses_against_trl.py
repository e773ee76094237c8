"""Values and gradients against TRL's own code, called with given log-probabilities and a stub for the trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from loss_batches import pairs, random_batch, random_mask, random_tokens

from prlhf_lightning import losses as L

B = 6
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


@pytest.fixture(scope="module")
def trl():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        pytest.importorskip("trl")
        from trl import DPOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def trl_dpo(trl, policy, reference, loss_types, beta, label_smoothing=0.0, weights=None):
    """TRL's DPOTrainer loss of a batch (a scalar) and its log."""
    tokens = torch.cat([policy.chosen.tokens, policy.rejected.tokens])
    mask = torch.cat([policy.chosen.mask, policy.rejected.mask])
    outputs = SimpleNamespace(log_probs=tokens)
    outputs.entropy = outputs.mean_logits = outputs.is_top1 = torch.zeros_like(mask)  # for its log only
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    with_prompt = torch.nn.functional.pad(mask, (1, 0)).long()  # TRL drops the first position: a token of prompt
    inputs = {
        "input_ids": torch.zeros_like(with_prompt),
        "completion_mask": with_prompt,
        "ref_chosen_logps": reference.chosen.sum,
        "ref_rejected_logps": reference.rejected.sum,
    }
    loss = trl.dpo._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


def rows(tokens, mask, reference_tokens):
    """Each pair as a batch of its own."""
    for i in range(B):
        at = [i, B + i]
        yield pairs(tokens[at], mask[at]), pairs(reference_tokens[at], mask[at])


DPO_CASES = {
    "sigmoid": (L.DPOLoss(0.7), {}),
    "ipo": (L.IPOLoss(0.7), {}),
    "hinge": (L.HingeLoss(0.7), {}),
    "robust": (L.RobustLoss(0.7, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "exo_pair": (L.EXOLoss(0.7, label_smoothing=0.01), {"label_smoothing": 0.01}),
    "nca_pair": (L.NCALoss(0.7), {}),
    "bco_pair": (L.BCOLoss(0.7), {}),  # TRL has no threshold: ours before its first update
    "sppo_hard": (L.SPPOLoss(0.7), {}),
    "apo_zero": (L.APOZeroLoss(0.7), {}),
    "apo_down": (L.APODownLoss(0.7), {}),
    "discopop": (L.DiscoPOPLoss(0.7), {}),
    "sft": (L.SFTLoss(), {}),
}


@pytest.mark.parametrize("name", DPO_CASES)
def test_each_pair_has_value_and_gradient_of_trls_dpo_trainer(trl, name):
    loss, settings = DPO_CASES[name]
    mask = random_mask(2 * B)
    leaf, reference_tokens = random_tokens(mask, 1).requires_grad_(), random_tokens(mask, 2)
    tokens = leaf * mask  # as in a policy, padding has no gradient
    ours = loss(pairs(tokens, mask), pairs(reference_tokens, mask)).losses
    theirs = torch.stack(
        [trl_dpo(trl, *row, [name], 0.7, **settings)[0] for row in rows(tokens, mask, reference_tokens)]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaf, retain_graph=True),
        torch.autograd.grad(theirs.sum(), leaf),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize(("name", "loss_class"), [("aot", L.AOTLoss), ("aot_unpaired", L.AOTUnpairedLoss)])
def test_aot_has_mean_and_gradient_of_trls_dpo_trainer(trl, name, loss_class):
    tokens, policy, reference = random_batch(B)
    ours = loss_class(0.7, label_smoothing=0.2)(policy, reference).losses.mean()
    theirs = trl_dpo(trl, policy, reference, [name], 0.7, label_smoothing=0.2)[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, tokens), torch.autograd.grad(theirs, tokens))


def test_dpo_with_an_sft_weight_is_trls_sigmoid_plus_sft(trl):
    _, policy, reference = random_batch(1)
    theirs = trl_dpo(trl, policy, reference, ["sigmoid", "sft"], 0.7, weights=[1.0, 0.3])[0]
    torch.testing.assert_close(L.DPOLoss(0.7, sft_weight=0.3)(policy, reference).losses.mean(), theirs)


def test_dpo_rewards_are_those_that_trl_logs(trl):
    _, policy, reference = random_batch(B)
    ours, log = L.DPOLoss(0.7)(policy, reference), trl_dpo(trl, policy, reference, ["sigmoid"], 0.7)[1]
    assert ours.chosen_rewards.mean().item() == pytest.approx(log["rewards/chosen"][0])
    assert ours.rejected_rewards.mean().item() == pytest.approx(log["rewards/rejected"][0])


def trl_cpo(trl, chosen, rejected, loss_type, beta, **settings):
    trainer = SimpleNamespace(accelerator=ACCELERATOR, alpha=0.0, beta=beta, loss_type=loss_type, label_smoothing=0.0)
    vars(trainer).update(settings)
    return trl.cpo.cpo_loss(trainer, chosen, rejected)


def assert_same_losses_gradients_and_rewards(ours, theirs, tokens, **tolerance):
    assert_close = torch.testing.assert_close
    assert_close(ours.losses, theirs[0], **tolerance)
    gradients = [torch.autograd.grad(losses.sum(), tokens)[0] for losses in (ours.losses, theirs[0])]
    assert_close(*gradients, **tolerance)
    assert_close((ours.chosen_rewards, ours.rejected_rewards), theirs[1:3], **tolerance)


def test_cpo_equals_trls_cpo_trainer(trl):
    tokens, policy, _ = random_batch(B)
    theirs = trl_cpo(trl, policy.chosen.sum, policy.rejected.sum, "sigmoid", 0.7)
    assert_same_losses_gradients_and_rewards(L.CPOLoss(0.7, sft_weight=0.0)(policy), theirs, tokens)


def test_simpo_equals_trls_cpo_trainer(trl):
    tokens, policy, _ = random_batch(B)
    theirs = trl_cpo(trl, policy.chosen.mean, policy.rejected.mean, "simpo", 2.5, simpo_gamma=0.8)
    assert_same_losses_gradients_and_rewards(L.SimPOLoss(2.5, gamma=0.8)(policy), theirs, tokens)


def test_label_smoothing_of_dpo_is_trls_cpo_on_log_ratios(trl):
    tokens, policy, reference = random_batch(B)
    ratios = policy.chosen.sum - reference.chosen.sum, policy.rejected.sum - reference.rejected.sum
    theirs = trl_cpo(trl, *ratios, "sigmoid", 0.7, label_smoothing=0.2)
    assert_same_losses_gradients_and_rewards(L.DPOLoss(0.7, label_smoothing=0.2)(policy, reference), theirs, tokens)


def test_orpo_equals_trls_orpo_trainer(trl):
    tokens, policy, _ = random_batch(B)
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=0.7)
    losses, *rewards = trl.orpo.odds_ratio_loss(trainer, policy.chosen.mean, policy.rejected.mean)[:3]
    theirs = -losses.double(), *(reward.double() for reward in rewards)  # TRL subtracts its loss, and is in float32
    ours = L.ORPOLoss(0.7, sft_weight=0.0)(policy)
    assert_same_losses_gradients_and_rewards(ours, theirs, tokens, rtol=1e-4, atol=1e-6)
