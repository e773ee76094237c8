"""Online RL by the command line, with a reward model that `fit` trained."""

from __future__ import annotations

import json

import pytest
from short_runs import fit, reward_config, run_config, write_config

from prlhf_lightning.cli.main import main
from prlhf_lightning.training.reward_scorer import load_scorer

REWARD = "prlhf_lightning.training.online_rewards.RewardModelReward"


@pytest.fixture
def config(model_path, votes, tmp_path):
    (tmp_path / "reward").mkdir()
    checkpoint = fit(tmp_path / "reward", reward_config(tmp_path / "reward", model_path, votes))
    reward = {"function": {"class_path": REWARD, "init_args": {"path": str(checkpoint)}}}
    length = {"function": "test_fit_online.brevity", "weight": 0.1}
    config = run_config(tmp_path, {"model": model_path}, votes)
    config["model"] |= {
        "loss": "DrGRPOLoss",
        "rewards": [reward, length],
        "answers_per_prompt": 4,
        "sampling": {"max_new_tokens": 6},
    }
    config["trainer"] |= {"max_steps": 3, "max_epochs": -1, "val_check_interval": 3}
    config["data"] |= {"batch_size": 4, "validation_fraction": 0.2}
    return config, checkpoint


def brevity(completions, **kwargs):
    return [-float(len(text.split())) for text in completions]


def test_a_run_is_trained_resumed_and_used(config, tmp_path, capsys):
    content, reward_model = config
    checkpoint = fit(tmp_path, content)
    run = checkpoint.parents[1]
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    texts = [[row[name]] for row in rows for name in ("user_id", "prompt", "answer") if row["answer"]]
    found = [row["reward"] for row in rows if row["answer"]]
    scorer = load_scorer(reward_model)
    expected = [
        float(scorer.score(*texts[3 * n : 3 * n + 3])) + 0.1 * brevity(texts[3 * n + 2])[0] for n in range(len(found))
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    main(["fit", "-c", str(write_config(tmp_path, content)), "--ckpt_path", "last", "--trainer.max_steps", "4"])
    main(["validate", "--ckpt_path", str(checkpoint), "-c", str(write_config(tmp_path, content))])
    assert "reward of answers" in capsys.readouterr().out
    main(["generate", "--model", str(checkpoint), "--user", "ann", "--prompt", "the cat", "--max_new_tokens", "3"])
    assert capsys.readouterr().out.strip()
    pairs = tmp_path / "pairs.jsonl"  # of the users and prompts of the run's own data
    main(["make-pairs", "--model", str(run), "--reward_model", str(reward_model), "--output", str(pairs)])
    assert pairs.is_file()


@pytest.mark.parametrize(
    ("setting", "instead"),
    [({"gradient_clip_val": 1.0}, "model.max_grad_norm"), ({"accumulate_grad_batches": 2}, "data.batch_size")],
    ids=str,
)
def test_settings_without_effect_name_those_that_have_one(config, tmp_path, setting, instead):
    content, _ = config
    content["trainer"] |= setting
    with pytest.raises(SystemExit, match=instead):
        fit(tmp_path, content)
