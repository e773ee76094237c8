"""Scorers: users and texts in, rewards out."""

import json

import pytest
import torch
from conftest import write_votes
from short_runs import fit, reward_config, run_config
from transformers import AutoModel, AutoTokenizer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards import RewardBackbone
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.reward_scorer import RewardScorer, load_scorer

TEXTS = [("the cat", "dog ran fast"), ("the cat", "sun"), ("a user likes", "moon yes no hello")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    write_votes(folder / "votes.jsonl", {"ann": 60, "bob": 60})
    return folder


@pytest.fixture(scope="module")
def checkpoint(model_path, folder):
    (folder / "reward").mkdir()
    return fit(folder / "reward", reward_config(folder / "reward", model_path, folder / "votes.jsonl"))


@pytest.fixture(scope="module")
def policy_checkpoint(model_path, folder):
    (folder / "policy").mkdir()
    config = run_config(folder / "policy", {"model": model_path}, folder / "votes.jsonl")
    config["model"] |= {"optim": {"user_lr": 1.0}, "cache_reference": False}
    return fit(folder / "policy", config)


def by_hand(checkpoint, model_path, code, prompt, completion):
    """The reward of a text of training's kind, in float64, from the weights in the file alone."""
    weights = {name: weight.double() for name, weight in torch.load(checkpoint)["state_dict"].items()}
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = [tokenizer.bos_token_id, *tokenizer(f"{prompt} {completion}", add_special_tokens=False)["input_ids"]]
    ids.append(tokenizer.eos_token_id)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(model_path).double()(torch.tensor([ids])).last_hidden_state[0, -1]
    centered = hidden - weights["features.means"][0]
    head = weights["user_model.generic_prompt"].flatten() + code.double() @ weights["user_model.basis"]
    return float(centered / centered.norm() @ head[: len(centered)])


def test_rewards_are_those_computed_by_hand_in_float64(checkpoint, model_path):
    scorer = RewardScorer.load(checkpoint)
    codes = torch.load(checkpoint)["state_dict"]["user_model.codes.weight"]
    for user, code in {"ann": codes[1], "bob": codes[2], "nobody": torch.zeros(2)}.items():
        found = scorer.score([user] * len(TEXTS), *zip(*TEXTS, strict=True))
        expected = [by_hand(checkpoint, model_path, code, *text) for text in TEXTS]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
        assert found.std() > 1e-3
    assert (scorer.knows("ann"), scorer.knows("nobody")) == (True, False)


def test_each_text_is_embedded_once_for_all_users(checkpoint, monkeypatch):
    scorer, embedded = RewardScorer.load(checkpoint), []
    forward = RewardBackbone.forward
    monkeypatch.setattr(RewardBackbone, "forward", lambda self, p, c: embedded.extend(p) or forward(self, p, c))
    scorer.score(["ann", "bob", "ann"], ["the cat"] * 3, ["sun", "sun", "moon"])
    assert len(embedded) == 2


def test_a_text_without_a_reward_is_named_and_costs_no_other(model_path, folder):
    (folder / "drop").mkdir()
    config = reward_config(folder / "drop", model_path, folder / "votes.jsonl")
    config["data"] |= {"max_completion_length": 6, "overlong": "drop"}
    scorer = RewardScorer.load(fit(folder / "drop", config))
    scored = scorer.scored(["ann"] * 3, ["the cat"] * 3, ["sun", "sun " * 7, ""])
    assert scored.rewards.isnan().tolist() == [False, True, True]
    assert scored.problems[1] == "completion has 8 tokens, limit 6"
    assert scored.problems[2].startswith("completion has no token")


def test_a_text_over_the_limit_is_cut_as_in_training(model_path, folder):
    (folder / "cut").mkdir()
    config = reward_config(folder / "cut", model_path, folder / "votes.jsonl")
    config["data"] |= {"max_completion_length": 6}
    scorer = RewardScorer.load(fit(folder / "cut", config))
    longer, longest = scorer.score(["ann"] * 2, ["the cat"] * 2, ["sun " * 7, "sun " * 9])
    assert longer == longest
    assert scorer.cut["completion"].count == 2


def test_plain_texts_are_wrapped_as_in_training(chat_model, tmp_path):
    path = chat_model("qwen")
    rows = [
        {"user_id": user, "prompt": [{"role": "user", "content": "Rest?"}],
         "chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]}
        for user, good, bad in [("ann", "Walk more!", "Bread."), ("bob", "Bread.", "Walk more!")] * 4
    ]  # fmt: skip
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scorer = RewardScorer.load(fit(tmp_path, reward_config(tmp_path, str(path), tmp_path / "votes.jsonl")))
    plain, wrapped = scorer.score(["ann", "ann"], ["Rest?", rows[0]["prompt"]], ["Walk more!", rows[0]["chosen"]])
    assert plain == wrapped


def test_a_policy_scores_by_its_implicit_rewards(policy_checkpoint, model_path):
    from prlhf_lightning.data.batching import collate

    scorer = load_scorer(policy_checkpoint)
    model = PersonalizedLM.load_from_checkpoint(policy_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = [
        {"user_id": "ann", "record": 0, "user_text_ids": [], "prompt_ids": tokenizer(prompt)["input_ids"]}
        | {
            side: [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
            for side in ("chosen_ids", "rejected_ids")
        }
        for prompt, text in TEXTS
    ]
    expected = model.rewards(collate(rows))[0]
    assert torch.allclose(scorer.score(["ann"] * 3, *zip(*TEXTS, strict=True)), expected, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_only_a_reward_model_is_an_explicit_scorer(policy_checkpoint, checkpoint, tmp_path):
    with pytest.raises(ConfigurationError, match="is of a policy and not of a reward model"):
        RewardScorer.load(policy_checkpoint)
    with pytest.raises(ConfigurationError, match="there is no checkpoint"):
        RewardScorer.load(tmp_path / "none.ckpt")
    assert isinstance(load_scorer(checkpoint.parent.parent), RewardScorer)
