"""Reward models from data to checkpoint."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import WORDS, write_votes
from quiet_trainer import quiet_trainer

from prlhf_lightning import losses, user_models
from prlhf_lightning.data import FileSource, RankingSource, RatingSource
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards import JudgedPairs, RewardBackbone
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule

USERS = {"ann": 60, "bob": 60, "cy": 60, "dee": 60}


@pytest.fixture
def data(model_path, tmp_path):
    """Users who like long or short answers, in turn."""
    train = write_votes(tmp_path / "votes.jsonl", USERS)
    held_out = write_votes(tmp_path / "held_out.jsonl", {**USERS, "eve": 20}, seed=1)
    backbone = RewardBackbone(model_path)
    return RewardDataModule(FileSource(train, held_out), backbone.tokenizer, ties="drop")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # of what trainers write


def fitted(model_path, data, user_model=None, **settings):
    model = user_model or user_models.LowRankUserModel(num_tokens=1, rank=2)
    module = PersonalizedRewardModel(model, RewardBackbone(model_path), **{"precision": 30.0, **settings})
    trainer = quiet_trainer(Path(), max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, data)
    return module, trainer


def margins(module, pairs, generic=False):
    features, rows = module.features_of(pairs.texts), module.rows_of(pairs.user_ids)
    return module.rewards(features, rows, pairs.chosen, generic) - module.rewards(
        features, rows, pairs.rejected, generic
    )


@pytest.fixture
def held_out(data):
    return data.judged(data.evaluation_pairs("seen"))


def test_users_who_disagree_are_told_apart(model_path, data):
    _, trainer = fitted(model_path, data)
    values = trainer.callback_metrics
    assert values["val/seen/accuracy"] > values["val/seen/generic_accuracy"] + 0.15


def test_a_checkpoint_gives_the_same_rewards(model_path, data, held_out, tmp_path):
    module, trainer = fitted(model_path, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    backbone, user_model = RewardBackbone(model_path), user_models.LowRankUserModel(num_tokens=1, rank=2)
    loaded = PersonalizedRewardModel.load_from_checkpoint(
        tmp_path / "model.ckpt", user_model=user_model, backbone=backbone
    )
    assert torch.equal(margins(loaded, held_out), margins(module, held_out))
    assert not any("backbone" in name for name in torch.load(tmp_path / "model.ckpt")["state_dict"])


def test_a_checkpoint_of_another_backbone_is_refused(model_paths, data, tmp_path):
    _, trainer = fitted(model_paths["llama"], data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    user_model = user_models.LowRankUserModel(num_tokens=1, rank=2)
    with pytest.raises(ConfigurationError, match="not those of training"):
        PersonalizedRewardModel.load_from_checkpoint(
            tmp_path / "model.ckpt", user_model=user_model, backbone=RewardBackbone(model_paths["qwen"])
        )


def test_each_text_is_embedded_once(model_path, data, monkeypatch):
    seen = []
    forward = RewardBackbone.forward

    def counted(self, prompts, completions):
        seen.extend(map(tuple, zip(map(bytes, prompts), map(bytes, completions), strict=True)))
        return forward(self, prompts, completions)

    monkeypatch.setattr(RewardBackbone, "forward", counted)
    fitted(model_path, data)
    first = len(seen)
    fitted(model_path, data)
    assert first == len(set(seen)) == len(seen)


def test_rewards_of_every_user_are_centered(model_path, data):
    module, _ = fitted(model_path, data)
    pairs = data.training_pairs()
    features = module.features_of(pairs.texts)
    every = torch.arange(len(pairs.texts))
    for row in range(len(module.vocabulary)):
        rewards = module.rewards(features, torch.full_like(every, row), every)
        assert rewards.mean().abs() < 0.2 * rewards.std()


def test_an_unknown_user_is_the_generic_user(model_path, data, held_out):
    module, _ = fitted(model_path, data)
    strangers = JudgedPairs(("nobody",) * len(held_out), held_out.chosen, held_out.rejected, held_out.texts)
    assert torch.equal(margins(module, strangers), margins(module, held_out, generic=True))


def test_new_users_are_learned_from_their_pairs(model_path, data):
    module, _ = fitted(model_path, data)
    pairs = data.judged(data.evaluation_pairs("seen"))
    users, codes, covariances = module.new_users(pairs)
    trained = module.user_model.codes.weight[module.rows_of(users.ids)]
    alike = torch.nn.functional.cosine_similarity(codes[1:], trained)
    assert alike.min() > 0.5
    assert torch.equal(codes[0], torch.zeros(2))
    assert covariances[1:].diagonal(dim1=1, dim2=2).max() < 1.0 + 1e-5


@pytest.mark.parametrize(
    ("user_model", "loss"),
    [
        (user_models.ClusterUserModel(num_clusters=2, num_tokens=1), losses.BradleyTerryLoss()),
        (user_models.IndividualUserModel(num_tokens=1), losses.HingeLoss()),
        (user_models.LowRankUserModel(num_tokens=1, rank=2), losses.BradleyTerryLoss(label_smoothing=0.1)),
    ],
)
def test_other_models_and_losses_train_by_gradient_descent(model_path, data, user_model, loss):
    _, trainer = fitted(model_path, data, user_model, loss=loss, steps=150, precision=1.0, lr=0.03)
    values = trainer.callback_metrics
    assert values["val/seen/accuracy"] > values["val/seen/generic_accuracy"] + 0.15


def write_judgments(path, kind, seed):
    """Write ratings, rankings or thumbs by two users: one likes long texts, one short ones."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for user, sign in (("ann", 1), ("bob", -1)):
            for number in range(60):
                prompt = f"{WORDS[number % 5]} {WORDS[number // 5]}"
                texts = [" ".join(draw.choices(WORDS, k=k)) for k in (1, 3, 6)][::sign]  # better and better
                if kind == "ratings":
                    rows = [{"completion": text, "rating": n} for n, text in enumerate(texts)]
                elif kind == "rankings":
                    rows = [{"completions": texts[::-1]}]
                else:  # one text of each prompt
                    place = draw.choice((0, 2))
                    rows = [{"completion": texts[place], "label": place > 0}]
                file.writelines(json.dumps({"user_id": user, "prompt": prompt, **row}) + "\n" for row in rows)
    return path


@pytest.mark.parametrize(
    ("kind", "source"),
    [("ratings", RatingSource), ("rankings", RankingSource), ("thumbs", lambda raw: raw)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ratings_rankings_and_thumbs_tell_users_apart(model_path, tmp_path, kind, source):
    train, held_out = (write_judgments(tmp_path / f"{seed}.jsonl", kind, seed) for seed in (0, 1))
    feedback = "thumbs" if kind == "thumbs" else "pairs"
    data = RewardDataModule(
        source(FileSource(train, held_out)), RewardBackbone(model_path).tokenizer, feedback=feedback, ties="drop"
    )
    values = fitted(model_path, data)[1].callback_metrics
    assert values["val/seen/accuracy"] > values["val/seen/generic_accuracy"] + 0.15


def test_a_thumb_is_a_comparison_with_the_same_text_for_all(model_path, tmp_path):
    """A user whose every thumb is up is easier to please than one whose every thumb is down."""
    draw, path = random.Random(0), tmp_path / "thumbs.jsonl"
    with path.open("w") as file:
        for user, label in (("ann", True), ("bob", False)):
            for number in range(40):
                row = {"prompt": f"cat {WORDS[number % 9]}", "completion": draw.choice(WORDS), "label": label}
                file.write(json.dumps({"user_id": user, **row}) + "\n")
    tokenizer = RewardBackbone(model_path).tokenizer
    data = RewardDataModule(FileSource(path), tokenizer, feedback="thumbs", validation_fraction=0.0)
    module, _ = fitted(model_path, data)
    pairs = data.training_pairs()
    up = torch.tensor([user == "ann" for user in pairs.user_ids])
    threshold = pairs.rejected[up][0]
    assert (pairs.rejected[up] == threshold).all()
    assert (pairs.chosen[~up] == threshold).all()
    rewards = module.rewards(module.features_of(pairs.texts), module.rows_of(["ann", "bob"]), threshold.expand(2))
    assert rewards[0] < 0 < rewards[1]


def test_without_users_there_is_one_reward(model_path, data, held_out):
    module, trainer = fitted(model_path, data, user_models.UniformUserModel(num_tokens=1))
    assert "val/seen/generic_accuracy" not in trainer.callback_metrics
    assert torch.equal(margins(module, held_out), margins(module, held_out, generic=True))


def test_a_soft_prompt_of_several_vectors_is_refused(model_path):
    with pytest.raises(ConfigurationError, match="num_tokens is 10"):
        PersonalizedRewardModel(user_models.LowRankUserModel(), RewardBackbone(model_path))
