"""Losses and advantages of online RL against TRL's own code, called with given log-probabilities and rewards."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from completions import MAX_LENGTH, RL_LOSSES, random_completions, sizes_of, step
from datasets import Dataset

from prlhf_lightning import losses as L

ACCELERATOR = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def trl_grpo(trl, c, rows=slice(None), accumulated=1, generated_tokens=None, steps=None, **settings):
    """The loss of TRL's GRPOTrainer for one micro-batch, with its gradient with respect to all log-probs."""
    args = {"use_bias_correction_kl": True, "delta": None, "steps_per_generation": steps or accumulated}
    args |= {name: settings.pop(name) for name in list(settings) if name in args}
    log_probs = c.log_probs[rows]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(**args),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=accumulated,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        **{"importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2} | settings,
    )
    ids = torch.zeros_like(c.mask[rows]).long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": c.mask[rows].long(),
        "advantages": c.advantages[rows],
        "old_per_token_logps": c.old[rows],
        "ref_per_token_logps": c.reference[rows],
        "num_items_in_batch": torch.tensor(generated_tokens or int(c.mask.sum())),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, *torch.autograd.grad(loss, c.log_probs)


def ours(loss, c, rows=slice(None), **settings):
    share = step(loss, c, rows, **settings).loss
    return share, *torch.autograd.grad(share, c.log_probs)


GRPO_CASES = {
    "grpo": (L.GRPOLoss(), {}),
    "grpo, k3": (L.GRPOLoss(beta=0.3), {"loss_type": "grpo", "beta": 0.3}),
    "grpo, dual clip": (L.GRPOLoss(max_ratio=1.3), {"loss_type": "grpo", "delta": 1.3}),
    "dr_grpo": (L.DrGRPOLoss(beta=0.3), {"beta": 0.3}),
    "bnpo": (L.BNPOLoss(beta=0.3), {"beta": 0.3}),
    "dapo": (L.DAPOLoss(beta=0.3), {"beta": 0.3, "epsilon_high": 0.28}),
    "cispo": (L.CISPOLoss(max_ratio=1.2, beta=0.3), {"beta": 0.3, "epsilon_high": 1.2}),
    "gspo": (
        L.GSPOLoss(clip_low=0.1, clip_high=0.15),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
    ),
}


@pytest.mark.parametrize("name", GRPO_CASES)
def test_each_loss_has_value_and_gradient_of_trls_grpo(trl, name):
    loss, settings = GRPO_CASES[name]
    c = random_completions(rows=20)
    found = ours(loss, c)
    for mine, theirs in zip(found, trl_grpo(trl, c, **{"loss_type": name} | settings), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)  # the weights of tokens are in float32


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_micro_batches_add_up_as_in_trl(trl, name):
    c = random_completions(rows=12)
    loss, settings = GRPO_CASES[name]
    settings = {"loss_type": name} | settings
    halves = [slice(0, 6), slice(6, 12)]
    theirs = [trl_grpo(trl, c, half, accumulated=2, **settings) for half in halves]
    for half, (share, gradient) in zip(halves, theirs, strict=True):
        mine = ours(loss, c, half)
        torch.testing.assert_close(mine[0], share, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(mine[1], gradient, rtol=1e-6, atol=1e-9)


def test_dapo_divides_a_part_of_a_generation_batch_as_trl(trl):
    c, other = random_completions(rows=8), random_completions(rows=8, seed=1)
    generated = torch.cat([c.lengths, other.lengths])
    loss = L.DAPOLoss()
    sizes = L.StepSizes.of(c.lengths, MAX_LENGTH, generated)
    mine = ours(loss, c, denominator=loss.denominator(sizes))
    tokens = int(generated.sum())
    theirs = trl_grpo(trl, c, loss_type="dapo", epsilon_high=0.28, generated_tokens=tokens, steps=2)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-9)
    assert loss.denominator(sizes) != loss.denominator(sizes_of(c))


def test_rloo_has_value_and_gradient_of_trls_trainer(trl):
    c = random_completions(rows=20, spread=0.1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (c.log_probs, torch.zeros_like(c.log_probs), None),
        _metrics={"train": defaultdict(list)},
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=True),
    )
    ids = torch.zeros_like(c.mask).long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": c.mask.long(),
        "advantages": c.advantages,
        "old_logps": (c.old * c.mask).sum(1),
    }
    theirs = trl.RLOOTrainer._compute_loss(trainer, None, inputs)
    mine = ours(L.RLOOLoss(), c)
    torch.testing.assert_close(mine[0], theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mine[1], *torch.autograd.grad(theirs, c.log_probs), rtol=1e-6, atol=1e-9)
    assert 0 < step(L.RLOOLoss(), c).clipped.sum() < c.mask.sum()


GROUP = 4
REWARDS = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 5.0, 5.0, 5.0, 0.3, float("nan"), 0.1, -2.0, *[float("nan")] * 3, 1.0])
GROUPS = torch.arange(len(REWARDS) // GROUP).repeat_interleave(GROUP)


def trl_advantages(trl, kind, model_path, tmp_path, beta=0.0, **settings):
    """The advantages that a TRL trainer computes of `REWARDS`, with its log-probs of random completions."""
    given = [None if reward != reward else reward for reward in REWARDS.tolist()]
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=len(REWARDS), num_generations=GROUP, beta=beta,
        max_completion_length=3, report_to=[], use_cpu=True, seed=0, num_iterations=2, **settings,
    )  # fmt: skip
    rows = [{"prompt": "the cat"} for _ in REWARDS]
    trainer = getattr(trl, f"{kind}Trainer")(
        model_path, lambda completions, **_: given, config, train_dataset=Dataset.from_list(rows)
    )
    if beta:  # a reference that differs from the policy
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.mul_(-3)
    return trainer, trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize(
    ("scale", "advantages"),
    [
        ("group", L.group_scaled_advantages),
        ("none", L.centered_advantages),
        ("batch", L.batch_scaled_advantages),
    ],
)
def test_advantages_are_those_of_trls_grpo(trl, model_path, tmp_path, scale, advantages):
    _, theirs = trl_advantages(trl, "GRPO", model_path, tmp_path, scale_rewards=scale)
    torch.testing.assert_close(advantages(REWARDS, GROUPS), theirs["advantages"], rtol=1e-5, atol=1e-6)


def test_leave_one_out_advantages_are_those_of_trls_rloo(trl, model_path, tmp_path):
    trainer, theirs = trl_advantages(trl, "RLOO", model_path, tmp_path, beta=0.5)
    ids, mask = theirs["completion_ids"], theirs["completion_mask"]
    both = torch.cat([theirs["prompt_ids"], ids], 1), torch.cat([theirs["prompt_mask"], mask], 1)
    with torch.no_grad():
        old, reference = (
            trainer._get_per_token_logps_and_entropies(model, *both, ids.shape[1])[0]
            for model in (trainer.model, trainer.ref_model)
        )
    shaped = L.RLOOLoss(beta=0.5).shaped_rewards(REWARDS, old, reference, mask.bool())
    assert not torch.allclose(shaped, REWARDS, atol=0.1, equal_nan=True)
    found = L.leave_one_out_advantages(shaped, GROUPS)
    torch.testing.assert_close(found, theirs["advantages"], rtol=1e-5, atol=1e-5)


def test_every_loss_is_compared_with_trl():
    assert {*RL_LOSSES} == {name.split(",")[0] for name in GRPO_CASES} | {"rloo"}
