"""Online RL: users' answers are sampled, scored and trained under the users' own soft prompts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import WORDS
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import DrGRPOLoss, GRPOLoss, RLOOLoss
from prlhf_lightning.online import Reward
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.training import OnlineDataModule, OnlineRL, Optim, PersonalizedLM
from prlhf_lightning.training.callbacks.online import AnswerTable
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.training.checkpoint_entry import KEY
from prlhf_lightning.training.user_rows import UserRows
from prlhf_lightning.types import select_pairs
from prlhf_lightning.user_models import IndividualUserModel

LIKES = {"ann": "cat", "bob": "dog", "cy": "cat", "dee": "dog"}


def taste(completions, user_id, **kwargs):
    """Users like answers with their word, and not with the others' word."""
    words = [
        (LIKES[user], "dog" if LIKES[user] == "cat" else "cat", text.split())
        for user, text in zip(user_id, completions, strict=True)
    ]
    return [float(liked in text) - float(other in text) for liked, other, text in words]


class Noted(GRPOLoss):
    """Notes how far each answer's ratios are from 1, in logs."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.drifts = [*getattr(self, "drifts", []), output.drift]
        return output


def make(model_path, votes, loss=None, reward=taste, num_tokens=2, batch_size=4, **settings):
    torch.manual_seed(0)
    module = OnlineRL(
        IndividualUserModel(num_tokens),
        CausalLMPolicy(model_path, lora=LoRA(rank=2)),
        DrGRPOLoss() if loss is None else loss,
        [Reward(reward)],
        optim=Optim(lr=1e-2, user_lr=5e-2, warmup_steps=0),
        sampling=Sampling(max_new_tokens=6),
        **{"answers_per_prompt": 4, "micro_batch_size": 3, **settings},
    )
    data = OnlineDataModule(
        FileSource(str(votes)), tokenizer=model_path, batch_size=batch_size, validation_fraction=0.2
    )
    return module, data


def fit(folder, module, data, ckpt_path=None, **options):
    trainer = quiet_trainer(folder, **{"max_steps": 3, "limit_val_batches": 0, "max_epochs": -1, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def largest_difference(a, b) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(a.values(), b.values(), strict=True))


def test_the_ratio_of_the_first_update_is_exactly_one(model_path, votes, tmp_path):
    module, data = make(model_path, votes, Noted(beta=0.1), micro_batch_size=4, updates=2)
    fit(tmp_path, module, data, max_steps=4)
    first, second = module.policy_gradient.drifts[::2], module.policy_gradient.drifts[1::2]
    assert len(first) == len(second) == 2
    assert all((drift == 0).all() for drift in first)
    assert all((drift > 0).any() for drift in second)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(model_path, votes, tmp_path, updates):
    settings = {"loss": GRPOLoss(beta=0.05), "updates": updates, "alpha": 0.7}
    keeps_all = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=updates)
    module, data = make(model_path, votes, **settings)
    steps = 14 * updates  # an epoch has 10 batches
    fit(tmp_path, module, data, callbacks=[keeps_all], max_steps=steps)
    for done in (3 * updates, 11 * updates):
        resumed, again = make(model_path, votes, **settings)
        fit(tmp_path, resumed, again, tmp_path / f"step={done}.ckpt", max_steps=steps)
        assert resumed.trainer.global_step == steps
        assert largest_difference(weights(module), weights(resumed)) == 0
        for name, value in module.advantages.state_dict().items():
            assert torch.equal(value, resumed.advantages.state_dict()[name]), name


@pytest.mark.parametrize("place", ["generation", "update"])
def test_a_run_that_broke_off_in_a_batch_repeats_it(model_path, votes, tmp_path, place):
    straight, data = make(model_path, votes)
    fit(tmp_path / "straight", straight, data, max_steps=6)
    broken, data = make(model_path, votes)
    calls = iter(range(100))
    name = {"generation": "_judged", "update": "configure_gradient_clipping"}[place]
    original = getattr(broken, name)

    def breaks(*args, **kwargs):
        if next(calls) == 4:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    setattr(broken, name, breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, broken, data, callbacks=[SaveOnInterrupt()], max_steps=6)
    resumed, data = make(model_path, votes)
    fit(tmp_path, resumed, data, tmp_path / "checkpoints" / "interrupted.ckpt", max_steps=6)
    assert largest_difference(weights(straight), weights(resumed)) == 0
    assert torch.equal(straight.advantages.squares, resumed.advantages.squares)


@pytest.mark.parametrize("loss", [GRPOLoss(beta=0.1), DrGRPOLoss(), RLOOLoss()], ids=lambda loss: type(loss).__name__)
def test_the_size_of_micro_batches_changes_nothing(model_path, votes, tmp_path, loss):
    ends = []
    for size in (1, 4):
        module, data = make(model_path, votes, loss, micro_batch_size=size, sampling_batch_size=4 * size)
        start = fit(tmp_path, module, data, max_steps=0) and weights(module)
        fit(tmp_path, module, data, max_steps=2)
        ends.append(weights(module))
    assert largest_difference(start, ends[0]) > 1e-3
    assert largest_difference(*ends) < 1e-5


def test_the_gradient_is_that_of_the_definition(model_path, votes, tmp_path):
    """The oracle scores each answer by itself, with the Hugging Face model: prompts are never scored."""
    module, data = make(model_path, votes, DrGRPOLoss(), advantages="centered", max_grad_norm=None)
    seen = {}

    def note(optimizer, max_norm=None, algorithm=None):
        seen["grads"] = {n: p.grad.to_dense() for n, p in module.named_parameters() if p.grad is not None}

    rolled = module._roll_out

    def roll_out(batch, batch_idx):
        rollouts, shares = rolled(batch, batch_idx)
        seen.update(batch=batch, rollouts=rollouts)
        return rollouts, shares

    module.configure_gradient_clipping, module._roll_out = note, roll_out
    torch.use_deterministic_algorithms(False)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    module.optim = Optim(lr=1e-30, user_lr=1e-30)  # the oracle needs the weights of before the step
    trainer.fit(module, data)
    batch, rollouts = seen["batch"], seen["rollouts"]
    module.zero_grad()
    lm, ids = module.policy.lm, rollouts.answers.tokens.unpadded()
    texts = module.texts_of(rollouts.answers.tokens, batch.prompt.select(torch.arange(4).repeat_interleave(4)))
    rewards = torch.tensor(taste(texts, [user for user in batch.user_ids for _ in range(4)])).view(4, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    assert (advantages != 0).any()
    loss = torch.zeros(())
    for number, answer in enumerate(ids):
        prompt = batch.prompt.unpadded()[number // 4]
        user = select_pairs(batch, torch.tensor([number // 4]))
        (vectors,) = module.user_model(module.users_of(user)).vectors
        embed = lm.get_input_embeddings()
        row = torch.cat([embed(prompt[:1]), vectors, embed(prompt[1:]), embed(answer)])
        log_probs = lm(inputs_embeds=row[None]).logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
        loss = loss - advantages[number] * log_probs.gather(1, answer[:, None]).sum() / (16 * 6)
    loss.backward()
    found = {n: p.grad.to_dense() for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == seen["grads"].keys()
    for name, gradient in found.items():
        torch.testing.assert_close(seen["grads"][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_users_learn_to_get_what_they_like(model_path, votes, tmp_path):
    module, data = make(model_path, votes, batch_size=8, answers_per_prompt=8, micro_batch_size=8)
    options = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 5, "callbacks": [AnswerTable(4)]}
    trainer = fit(tmp_path, module, data, max_steps=100, **options)
    values = trainer.callback_metrics
    assert values["val/seen/reward"] > 0.9
    assert values["val/seen/reward"] > values["val/seen/generic_reward"] + 0.2
    assert values["val/seen/reward_worst_decile"] > 0.5
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {len([row for row in rows if row["step"] == step]) for step in {row["step"] for row in rows}} == {4}
    assert all(row["reward"] == taste([row["answer"]], [row["user_id"]])[0] for row in rows)
    (ann, bob) = (module.generate(["the moon"], [user], sampling=Sampling(6, 0.0))[0] for user in ("ann", "bob"))
    assert ("cat" in ann, "dog" in bob) == (True, True)


def test_a_batch_takes_no_more_than_the_steps_that_are_left(model_path, votes, tmp_path):
    module, data = make(model_path, votes, updates=3)
    assert fit(tmp_path, module, data, max_steps=4).global_step == 4


def test_the_row_of_an_absent_user_does_not_move(model_path, votes, tmp_path):
    module, data = make(model_path, votes, batch_size=2)
    keep = fit(tmp_path, module, data, max_steps=0) and module.user_model.row_tables()[0].clone()
    present = set()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: present.update(batch.user_ids) or step(batch, batch_idx)
    fit(tmp_path, module, data, max_steps=1)
    moved = (module.user_model.row_tables()[0] != keep).flatten(1).any(1)
    assert 0 < len(present) < 4
    assert {user for user in LIKES if moved[module.vocabulary.rows([user])[0]]} <= present
    assert moved.any()


def test_a_reward_that_fails_costs_its_answer_alone(model_path, votes, tmp_path):
    """As if the reward had not judged this answer; and the row is named."""
    ends = []
    for fails in (True, False):

        def odd(completions, user_id, fails=fails, **kwargs):
            rewards = taste(completions, user_id)
            for place, text in enumerate(completions):
                if text.startswith(tuple(WORDS[:6])):
                    if fails and len(completions) == 1:
                        raise RuntimeError("odd")
                    rewards[place] = math.nan if fails else None
            return rewards

        module, data = make(model_path, votes, reward=odd)
        if fails:
            with pytest.warns(UserWarning, match=r"votes.jsonl:\d+ \(user '\w+'\): odd has no score"):
                trainer = fit(tmp_path, module, data, max_steps=2)
        else:
            trainer = fit(tmp_path, module, data, max_steps=2)
        assert 0 < trainer.callback_metrics["train/unscorable"] < 1
        ends.append(weights(module))
    assert largest_difference(*ends) == 0


def test_rewards_get_all_columns_of_the_rows(model_path, votes, tmp_path):
    seen = {}

    def columns(prompts, completions, completion_ids, user_text, chosen, trainer_state, log_metric, **kwargs):
        log_metric("share", 0.25)
        seen.update(steps=(trainer_state.global_step, trainer_state.max_steps))
        seen.update(prompts=prompts, chosen=chosen, user_text=user_text, others=sorted(kwargs))
        return [float(len(ids)) for ids in completion_ids]

    module, data = make(model_path, votes, reward=columns, batch_size=2)
    assert fit(tmp_path, module, data, max_steps=1).callback_metrics["train/share"] == 0.25
    assert seen["steps"] == (0, 1)
    assert seen["others"] == ["user_id"]  # no judged answers but the named one
    assert len(seen["prompts"]) == 8
    assert all(prompt == seen["prompts"][0] for prompt in seen["prompts"][:4])
    lines = [line for line in votes.read_text().splitlines() if f'"prompt": "{seen["prompts"][0]}"' in line]
    assert any(f'"chosen": "{seen["chosen"][0]}"' in line for line in lines)


def test_a_reward_that_changes_a_row_changes_no_other(model_path, votes, tmp_path):
    def appends(completions, tags, **kwargs):
        for tag in tags:
            tag.append("seen")
        found.extend(len(tag) for tag in tags)
        return [float(len(text)) for text in completions]

    found = []
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    votes.write_text("".join(json.dumps({**row, "tags": []}) + "\n" for row in rows))
    module, data = make(model_path, votes, reward=appends)
    fit(tmp_path, module, data, max_steps=2)
    assert set(found) == {1}


def test_the_reference_sees_no_user(model_path, votes, tmp_path, monkeypatch):
    module, data = make(model_path, votes, GRPOLoss(beta=0.1))
    given = []
    score = CausalLMPolicy.reference_log_probs

    def noted(self, prompt, completions, soft_prompt=None, temperature=1.0):
        given.append(soft_prompt)
        return score(self, prompt, completions, soft_prompt, temperature)

    monkeypatch.setattr(CausalLMPolicy, "reference_log_probs", noted)
    fit(tmp_path, module, data, max_steps=1)
    assert given
    assert all(soft_prompt is None for soft_prompt in given)


def test_a_checkpoint_opens_as_that_of_any_policy(model_path, votes, tmp_path):
    module, data = make(model_path, votes)
    fit(tmp_path, module, data).save_checkpoint(tmp_path / "model.ckpt")
    parts = {"user_model": IndividualUserModel(2), "policy": CausalLMPolicy(model_path, lora=LoRA(rank=2))}
    loaded = PersonalizedLM.load_from_checkpoint(tmp_path / "model.ckpt", **parts, loss=module.loss)
    assert largest_difference(weights(module), weights(loaded)) == 0


def test_the_worst_served_users_weigh_more(model_path, votes, tmp_path):
    module, data = make(model_path, votes, worst_served=2.0)
    fit(tmp_path, module, data, max_steps=0)
    scale = module.advantages.train()
    rows = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0, 1.0, 0.0, 1.0])  # the second user is served better by 1
    found = module._advantages(rewards, rows, rows)
    mean = scale.mean(torch.arange(1, 5))
    expected = (2.0 * (mean[1] - mean[0])).exp()
    assert mean[1] > mean[0] + 0.1
    assert found[1] / found[3] == pytest.approx(float(expected), rel=1e-4)
    assert found.view(4, 2)[:, 1].sum() == pytest.approx(4 * 0.5 / float(scale.std(rows)[0]), rel=1e-3)


def test_a_removed_user_leaves_no_statistics(model_path, votes, tmp_path):
    module, data = make(model_path, votes)
    fit(tmp_path, module, data).save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    rows = UserRows(content)
    before = dict(content[KEY]["advantages"])
    rows.keep([1, 3, 4])  # without bob
    for name, value in content[KEY]["advantages"].items():
        assert torch.equal(value, before[name][[0, 1, 3, 4]])


def test_validation_asks_each_user_different_prompts(model_path, votes, tmp_path):
    lines = votes.read_text().splitlines()
    votes.write_text("".join(f"{line}\n" for line in [*lines, *lines]))  # all prompts twice
    _, data = make(model_path, votes)
    data.eval_prompts_per_user = 2
    data.setup("fit")
    (loader,) = data.val_dataloader()
    asked = [
        (user, tuple(ids.tolist()))
        for batch in loader
        for user, ids in zip(batch.user_ids, batch.prompt.unpadded(), strict=True)
    ]
    assert len(set(asked)) == len(asked)
    assert max(sum(user == one for one, _ in asked) for user in LIKES) == 2


def test_truncated_answers_can_be_left_out(model_path, votes, tmp_path):
    module, data = make(model_path, votes, Noted(), mask_truncated=True)
    fit(tmp_path, module, data, max_steps=0)
    module.trainer.fit_loop.epoch_progress.current.reset()
    batch = next(iter(data.train_dataloader()))
    module.trainer.state.fn = "fit"
    module.trainer.training = True
    rollouts, shares = module._roll_out(batch, 0)
    assert 0 < shares["truncated"][0] < 16
    assert (rollouts.mask.any(1) == ~rollouts.answers.truncated).all()


def test_settings_without_a_gradient_are_refused(model_path, votes):
    with pytest.raises(ConfigurationError, match="temperature"):
        make(model_path, votes)[0].__class__(
            IndividualUserModel(2),
            CausalLMPolicy(model_path),
            DrGRPOLoss(),
            [Reward(taste)],
            sampling=Sampling(temperature=0),
        )
    with pytest.raises(ConfigurationError, match="answers_per_prompt is 1"):
        make(model_path, votes, answers_per_prompt=1)
