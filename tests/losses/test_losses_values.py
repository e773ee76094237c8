from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import BY_PAIR, LOSSES, one_token_pairs, pairs, random_batch

from prlhf_lightning import losses as L

# Log-ratios ln 3 and -ln 3: at beta 1 the sigmoids of the rewards are 3/4 and 1/4, that of the margin is 9/10.
BY_HAND = {
    "dpo": (L.DPOLoss(1.0), -log(0.9)),
    "cdpo": (L.DPOLoss(1.0, label_smoothing=0.1), -0.9 * log(0.9) - 0.1 * log(0.1)),
    "ipo": (L.IPOLoss(1.0), (log(9) - 0.5) ** 2),
    "hinge": (L.HingeLoss(0.25), 1 - 0.25 * log(9)),
    "robust": (L.RobustLoss(1.0, label_smoothing=0.1), (-0.9 * log(0.9) + 0.1 * log(0.1)) / 0.8),
    "exo": (L.EXOLoss(1.0, label_smoothing=0.25), 0.9 * log(0.9 / 0.75) + 0.1 * log(0.1 / 0.25)),
    "discopop": (L.DiscoPOPLoss(1.0, tau=0.5), -log(0.9) / 82 + 81 / 82 / 9),  # σ(2 ln 9) = 81/82
    "apo_zero": (L.APOZeroLoss(1.0), 1 / 4 + 1 / 4),
    "apo_down": (L.APODownLoss(1.0), 3 / 4 + 1 / 10),
    "nca": (L.NCALoss(1.0), -log(3 / 4) - log(1 / 4) / 2 - log(3 / 4) / 2),
    "bco": (L.BCOLoss(1.0), -2 * log(3 / 4)),
    "sppo": (L.SPPOLoss(1.0), 2 * (log(3) - 0.5) ** 2),
    "aot": (L.AOTLoss(1.0), -log(0.9)),
    "aot_unpaired": (L.AOTUnpairedLoss(1.0), -log(0.9)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_worked_by_hand(name):
    loss, expected = BY_HAND[name]
    policy, reference = one_token_pairs([log(1 / 2)], [log(1 / 6)]), one_token_pairs([log(1 / 6)], [log(1 / 2)])
    assert loss(policy, reference).losses.item() == pytest.approx(expected, rel=1e-5)


def test_reference_free_values_worked_by_hand():
    policy = one_token_pairs([log(1 / 2)], [log(1 / 10)])  # odds 1 and 1/9
    assert L.ORPOLoss(0.5)(policy).losses.item() == pytest.approx(-0.5 * log(0.9) + log(2), rel=1e-5)
    assert L.CPOLoss(1.0)(policy).losses.item() == pytest.approx(-log(5 / 6) + log(2), rel=1e-5)
    assert L.SimPOLoss(1.0, gamma=log(5))(policy).losses.item() == pytest.approx(log(2), rel=1e-5)


def test_length_normalised_losses_average_over_tokens():
    tokens, mask = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    assert L.SFTLoss()(pairs(tokens, mask)).losses.item() == 1.5
    assert L.SimPOLoss(2.0)(pairs(tokens, mask)).chosen_rewards.item() == -3.0
    zero = pairs(torch.zeros(2, 2), mask)
    assert L.IPOLoss(0.5)(pairs(tokens, mask), zero).losses.item() == pytest.approx((-1.5 + 3 - 1) ** 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    tokens, policy, reference = random_batch(4)
    mask = torch.cat([policy.chosen.mask, policy.rejected.mask])
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](pairs(x * mask, mask), reference).losses, tokens, fast_mode=True
    )


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(BY_PAIR)), st.integers(0, 999), st.permutations(range(5)))
def test_permuting_pairs_permutes_losses(name, seed, order):
    _, policy, reference = random_batch(5, seed)

    def shuffled(x):
        rows = order + [5 + i for i in order]
        tokens, mask = torch.cat([x.chosen.tokens, x.rejected.tokens]), torch.cat([x.chosen.mask, x.rejected.mask])
        return pairs(tokens[rows], mask[rows])

    loss = BY_PAIR[name]
    torch.testing.assert_close(
        loss(shuffled(policy), shuffled(reference)).losses, loss(policy, reference).losses[order]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_at_extreme_log_ratios(name):
    log_probs = torch.tensor([0.0, -1e-30, -1e-8, -1.0, -1e4])
    chosen, rejected, *reference = torch.cartesian_prod(*[log_probs] * 4).T
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    losses = LOSSES[name](one_token_pairs(chosen, rejected), one_token_pairs(*reference)).losses
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True)
    assert torch.cat([losses, *gradients]).isfinite().all()


def test_dpo_of_a_policy_that_equals_its_reference_is_log_2():
    _, _, reference = random_batch(3)
    torch.testing.assert_close(L.DPOLoss()(reference, reference).losses, torch.full((3,), log(2)).double())


def test_robust_without_noise_is_dpo():
    _, policy, reference = random_batch(3)
    robust = L.RobustLoss(0.7, label_smoothing=0.0)(policy, reference).losses
    torch.testing.assert_close(robust, L.DPOLoss(0.7)(policy, reference).losses)


def test_robust_averaged_over_flipped_labels_is_clean_dpo():
    margin = torch.linspace(-3, 3, 7)
    mean = 0.8 * L.robust_loss(margin, 0.2) + 0.2 * L.robust_loss(-margin, 0.2)
    torch.testing.assert_close(mean, L.dpo_loss(margin))


def test_exo_is_zero_only_where_policy_meets_smoothed_label():
    assert L.exo_loss(torch.tensor(log(0.9 / 0.1)), 0.1).item() == pytest.approx(0, abs=1e-6)
    assert L.exo_loss(torch.tensor(log(0.8 / 0.2)), 0.1).item() > 0.01


def test_discopop_equals_the_papers_formula_where_finite():
    margin = torch.linspace(-20, 20, 81, dtype=torch.float64)
    weight = torch.sigmoid(margin / 0.05)
    naive = -torch.nn.functional.logsigmoid(margin) * (1 - weight) + torch.exp(-margin) * weight
    torch.testing.assert_close(L.discopop_loss(margin, 0.05), naive)


@pytest.mark.parametrize("name", ["ipo", "nca", "sppo", "simpo"])
def test_sft_weight_adds_the_chosen_nll_per_token_to_every_pair(name):
    _, policy, reference = random_batch(4)
    plain = LOSSES[name]
    with_sft = type(plain)(beta=plain.beta, sft_weight=0.25)
    expected = plain(policy, reference).losses - 0.25 * policy.chosen.mean
    torch.testing.assert_close(with_sft(policy, reference).losses, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_carry_no_gradient_and_losses_do(name):
    _, policy, reference = random_batch(3)
    out = LOSSES[name](policy, reference)
    assert out.losses.requires_grad
    assert out.losses.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (3,)
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("loss_class", [L.AOTLoss, L.AOTUnpairedLoss])
def test_aot_of_a_single_pair_is_dpo(loss_class):
    _, policy, reference = random_batch(1)
    torch.testing.assert_close(loss_class()(policy, reference).losses, L.DPOLoss()(policy, reference).losses)


def test_aot_puts_each_quantile_at_the_row_of_its_policy_margin():
    policy, reference = one_token_pairs([-1.0, -2.0], [-5.0, -5.0]), one_token_pairs([-4.0, -3.0], [-5.0, -5.0])
    # Policy margins 4, 3; reference margins 1, 2, sorted to face them as 2, 1.
    torch.testing.assert_close(L.AOTLoss(1.0)(policy, reference).losses, L.dpo_loss(torch.tensor([2.0, 2.0])))


def test_unpaired_aot_ignores_which_answers_form_a_pair():
    chosen, rejected, zero = [-1.0, -2.0, -3.0], [-4.0, -6.0, -5.0], one_token_pairs([0.0] * 3, [0.0] * 3)
    paired = L.AOTUnpairedLoss(1.0)(one_token_pairs(chosen, rejected), zero).losses
    shuffled = L.AOTUnpairedLoss(1.0)(one_token_pairs(chosen, rejected[::-1]), zero).losses
    torch.testing.assert_close(paired, shuffled)
    torch.testing.assert_close(paired, L.dpo_loss(torch.tensor([3.0, 3.0, 3.0])))
