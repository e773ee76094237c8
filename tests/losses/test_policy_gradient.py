"""Losses of online RL against loops in plain Python, and what must not change them."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from completions import MAX_LENGTH, RL_LOSSES, random_completions, sizes_of, step
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from prlhf_lightning import losses as L
from prlhf_lightning.errors import ConfigurationError

every_loss = pytest.mark.parametrize("name", RL_LOSSES)


def build(name):
    return RL_LOSSES[name](beta=0.2)


def by_hand(name, c):
    """The loss of a whole step, from its paper's equations."""
    low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}.get(name, (0.2, 0.2))
    total = 0.0
    for row, length in enumerate(c.lengths.tolist()):
        log_probs, old, reference = (part[row, :length].tolist() for part in (c.log_probs, c.old, c.reference))
        advantage = c.advantages[row].item()
        changes = [p - o for p, o in zip(log_probs, old, strict=True)]
        per_token = []
        for t in range(length):
            ratio = math.exp({"gspo": sum(changes) / length, "rloo": sum(changes)}.get(name, changes[t]))
            if name == "cispo":
                loss = -min(ratio, 5.0) * advantage * log_probs[t]
            else:
                loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if name != "rloo":
                gap = log_probs[t] - reference[t]
                loss += 0.2 * math.exp(changes[t]) * (math.exp(-gap) - 1 + gap)
            per_token.append(loss)
        total += sum(per_token) / (length if name in ("grpo", "gspo", "rloo") else 1)
    rows, tokens = len(c.lengths), sum(c.lengths.tolist())
    return total / {"dr_grpo": rows * MAX_LENGTH, "bnpo": tokens, "dapo": tokens, "cispo": tokens}.get(name, rows)


@every_loss
def test_the_value_is_that_of_the_equations(name):
    c = random_completions(rows=20)
    assert step(build(name), c).loss.item() == pytest.approx(by_hand(name, c), rel=1e-6)


@every_loss
@given(splits=st.sets(st.integers(1, 9)), seed=st.integers(0, 100))
def test_however_a_step_is_split_gradients_add_up(name, splits, seed):
    c = random_completions(rows=10, seed=seed)
    loss = build(name)
    whole = torch.autograd.grad(step(loss, c).loss, c.log_probs)[0]
    bounds = [0, *sorted(splits), 10]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    shares = [torch.autograd.grad(step(loss, c, rows).loss, c.log_probs)[0] for rows in parts]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-6, atol=1e-12)


@every_loss
def test_padding_on_the_left_or_more_of_it_changes_nothing(name):
    c = random_completions()
    rolls = (c.mask.shape[1] - c.lengths).tolist()

    def moved(part, fill):
        rolled = torch.stack([row.roll(roll) for row, roll in zip(part, rolls, strict=True)])
        return torch.nn.functional.pad(rolled, (2, 0), value=fill)

    mask = moved(c.mask, False)
    # Log-probs of padding are whatever the model says: even NaN must not matter.
    parts = {
        key: moved(getattr(c, key), math.nan).masked_fill(~mask, math.nan) for key in ("log_probs", "old", "reference")
    }
    other = SimpleNamespace(**parts, mask=mask, lengths=c.lengths, advantages=c.advantages)
    loss = build(name)
    found = step(loss, other)
    torch.testing.assert_close(found.loss, step(loss, c).loss, rtol=1e-6, atol=1e-12)
    gradients = [torch.autograd.grad(step(loss, x).loss, c.log_probs)[0] for x in (other, c)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.kl, step(loss, c).kl)


@every_loss
def test_at_the_first_update_the_gradient_is_that_of_reinforce(name):
    c = random_completions()
    c.log_probs = c.old.clone().requires_grad_()
    loss = RL_LOSSES[name](beta=0.0)
    output = step(loss, c)
    weights = 1 / c.lengths if name in ("grpo", "gspo") else torch.ones(len(c.lengths))
    truth = -(c.mask * (weights * c.advantages)[:, None]) / loss.denominator(sizes_of(c))
    torch.testing.assert_close(torch.autograd.grad(output.loss, c.log_probs)[0], truth.double(), rtol=1e-6, atol=1e-9)
    assert not output.drift.any()
    assert not output.clipped.any()


@every_loss
@pytest.mark.parametrize("change", [-500.0, 500.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_ratio_that_overflows_makes_nothing_nan(name, change, sign):
    c = random_completions()
    c.log_probs = (c.old + change * (torch.arange(7) == 0)).requires_grad_()
    c.advantages = sign * c.advantages.abs()
    output = step(build(name), c)
    assert output.loss.isfinite()
    assert torch.autograd.grad(output.loss, c.log_probs)[0].isfinite().all()
    assert output.drift.max() == 500


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "rloo"])
def test_dual_clip_stops_a_large_ratio_of_negative_advantage(name):
    c = random_completions(rows=2)
    c.log_probs = (c.old + 2 * c.mask).requires_grad_()  # ratios of at least e² > 3
    c.advantages = torch.tensor([-1.0, -1.0])
    free, dual = RL_LOSSES[name](beta=0.0), RL_LOSSES[name](beta=0.0, max_ratio=3.0)
    assert torch.autograd.grad(step(free, c).loss, c.log_probs)[0].any()
    output = step(dual, c)
    assert not torch.autograd.grad(output.loss, c.log_probs)[0].any()
    assert output.clipped.tolist() == c.lengths.tolist()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "rloo"])
def test_clipped_tokens_are_those_without_gradient(name):
    c = random_completions(rows=20)
    loss = RL_LOSSES[name](beta=0.0)
    output = step(loss, c)
    without = (torch.autograd.grad(output.loss, c.log_probs)[0] == 0) & c.mask
    assert 0 < without.sum() < c.mask.sum()
    assert output.clipped.tolist() == without.sum(1).tolist()


@every_loss
def test_a_completion_without_tokens_adds_nothing(name):
    c = random_completions()
    empty = SimpleNamespace(**vars(c))
    empty.mask = c.mask & (torch.arange(6) != 3)[:, None]
    loss = build(name)
    others = [step(loss, c, rows, denominator=5.0).loss for rows in (slice(0, 3), slice(4, 6))]
    torch.testing.assert_close(step(loss, empty, denominator=5.0).loss, sum(others))


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_divergence_is_reported_for_each_completion(kl):
    c = random_completions()
    found = step(L.GRPOLoss(beta=0.1, kl=kl), c).kl
    estimates = L.kl_estimates(c.log_probs, c.reference, (c.log_probs - c.old).exp(), kl)
    torch.testing.assert_close(found, (estimates * c.mask).sum(1).detach())
    assert not step(L.GRPOLoss(), c, reference=False).kl.any()


def test_shapes_that_would_broadcast_are_refused():
    c = random_completions()
    for field, value in {
        "advantages": c.advantages[:, None],
        "old": c.old[:1],
        "reference": c.reference[:, :1],
    }.items():
        with pytest.raises(ConfigurationError, match=f"GRPOLoss: {field}"):
            step(L.GRPOLoss(), SimpleNamespace(**vars(c) | {field: value}))


def test_a_missing_reference_is_refused():
    with pytest.raises(ConfigurationError, match=r"DAPOLoss with beta 0.1 .* got none"):
        step(L.DAPOLoss(beta=0.1), random_completions(), reference=False)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (L.GRPOLoss, {"beta": -0.1}),
        (L.GRPOLoss, {"kl": "k4"}),
        (L.GSPOLoss, {"clip_low": 0.0}),
        (L.DAPOLoss, {"clip_high": math.inf}),
        (L.DAPOLoss, {"max_ratio": 1.2}),
        (L.CISPOLoss, {"max_ratio": 0.5}),
    ],
)
def test_impossible_settings_are_refused_by_name(loss, settings):
    with pytest.raises(ConfigurationError, match=f"{loss.__name__}: {next(iter(settings))}"):
        loss(**settings)


@every_loss
def test_each_loss_is_built_by_name_with_explained_arguments(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.PolicyGradientLoss, "loss")
    config = parser.parse_object({"loss": {"class_path": RL_LOSSES[name].__name__, "init_args": {"beta": 0.1}}})
    assert parser.instantiate(config).loss.beta == 0.1
    explained = ArgumentParser()
    explained.add_class_arguments(RL_LOSSES[name], "loss")
    arguments = [action for action in explained._actions if action.dest.startswith("loss.")]
    assert arguments
    assert all(action.help for action in arguments)
