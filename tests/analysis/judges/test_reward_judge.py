"""Rulings of an explicit reward model; those of policies are in tests/reports."""

import pytest
from conftest import write_votes
from short_runs import fit, reward_config

from prlhf_lightning.analysis.judges import Person, RewardJudge
from prlhf_lightning.errors import JudgeError
from prlhf_lightning.training import load_scorer


def test_a_reward_model_rules_by_its_rewards(model_path, tmp_path):
    votes = write_votes(tmp_path / "votes.jsonl", {"ann": 60, "bob": 60})
    checkpoint = fit(tmp_path, reward_config(tmp_path, model_path, votes))
    judge = RewardJudge(checkpoint)
    judge.prepare(None)
    short, long = "sun red", "sun moon user likes short"
    scorer = load_scorer(checkpoint)
    for user in ("ann", "bob"):
        rewards = scorer.score([user] * 2, ["the cat"] * 2, [short, long])
        assert judge.margin("the cat", Person(user), short, long) == pytest.approx(float(rewards[0] - rewards[1]))
        assert judge.judge("the cat", Person(user), short, long) == ("a" if rewards[0] > rewards[1] else "b")
    assert judge.margin("the cat", Person("ann"), short, long) != judge.margin("the cat", Person("bob"), short, long)
    with pytest.raises(JudgeError, match="does not know this user"):
        judge.judge("the cat", Person("nobody"), short, long)
