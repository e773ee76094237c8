"""`benchmarks/baselines.py`: rows without leaks, an honest worst tenth, and a small study from end to end."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from conftest import write_votes

from prlhf_lightning.data.records import FeedbackRecord

CONFIG = """
trainer: {max_epochs: 1, accelerator: cpu}
model:
  user_model: {class_path: prlhf_lightning.user_models.IndividualUserModel, init_args: {num_tokens: 1}}
  policy:
    class_path: prlhf_lightning.policies.CausalLMPolicy
    init_args: {model: builtin:byte-lm, random_init: 0, lora: null}
  loss: {class_path: prlhf_lightning.losses.DPOLoss, init_args: {beta: 0.1}}
data:
  source: {class_path: prlhf_lightning.data.SimulatedSource, init_args: {num_users: 3}}
  batch_size: 8
  max_prompt_length: 32
"""


@pytest.fixture
def script(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    return importlib.import_module


def test_a_preface_shows_other_pairs_of_the_same_user(script):
    draw = np.random.default_rng(0)
    train = [
        FeedbackRecord(f"u{user}", "?", *(f"text-{user % 2}-{one}" for one in draw.choice(9, 2, replace=False)))
        for user in range(4)
        for _ in range(20)
    ]
    prefaces = script("baselines_rows").pair_prefaces(train, train, shown=3, characters=50, seed=0)
    assert all(preface.count("over:") == 3 for preface in prefaces)
    for record, preface in zip(train, prefaces, strict=True):
        assert record.chosen not in preface.split()
        assert record.rejected not in preface.split()
        own = [(one.chosen, one.rejected) for one in train if one.user_id == record.user_id]
        lines = preface.splitlines()
        shown = zip(lines[0::2], lines[1::2], strict=False)
        assert all((first.split()[-1], second.split()[-1]) in own for first, second in shown if first)


def test_the_worst_tenth_by_chance_is_no_worse(script):
    """The lowest tenth of 200 people with 20 pairs each would be near 0.5; all of them truly are at 0.7."""
    draw = np.random.default_rng(0)
    users, cells = np.repeat(np.arange(200), 20), np.arange(8000).reshape(2, -1)
    right = (draw.random(4000) < 0.7).astype(float)
    weights = script("baselines_table").worst_tenth(right, users, cells)
    lowest = np.sort(np.bincount(users, right) / 20)[:20].mean()
    assert lowest < 0.5
    assert (weights @ right) / weights.sum() == pytest.approx(0.7, abs=0.04)


def test_the_worst_tenth_are_those_served_worst(script):
    draw = np.random.default_rng(0)
    users, cells = np.repeat(np.arange(200), 20), np.arange(8000).reshape(2, -1)
    right = (draw.random(4000) < np.where(users < 20, 0.1, 0.9)).astype(float)
    weights = script("baselines_table").worst_tenth(right, users, cells)
    assert weights[users < 20].sum() > 0.9 * weights.sum()


def test_intervals_are_as_wide_as_the_spread_of_people_says(script):
    """For many people with the same number of pairs: 1.96 standard errors of the mean."""
    draw = np.random.default_rng(0)
    by_person = draw.normal(0.1, 0.3, 400)
    mean, low, high = script("baselines_table").interval_over_people(
        np.repeat(by_person, 3), np.repeat(np.arange(400), 3)
    )
    assert mean == pytest.approx(by_person.mean())
    assert high - low == pytest.approx(2 * 1.96 * by_person.std() / 20, rel=0.1)


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(script, tmp_path, monkeypatch, capsys):
    """Users alternate between liking long and short answers: one row for all can rank only half of the pairs."""
    users = {f"u{i}": 12 for i in range(4)}
    train, validation = (write_votes(tmp_path / f"{name}.jsonl", users, i) for i, name in enumerate(("train", "held")))
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(CONFIG)
    words = ["--train", str(train), "--validation", str(validation), "--out", str(out), "--seeds", "1", "--no_estimate"]
    words += ["--only", "one_score", "pairs_in_prompt", "personalized", "shrunk", "--config", str(config)]
    baselines = script("baselines")
    monkeypatch.setattr("sys.argv", ["baselines.py"])
    baselines.main(words)
    content = json.loads((out / "table.json").read_text())
    assert list(content["methods"]) == ["one_score", "pairs_in_prompt", "personalized", "shrunk"]
    assert content["validation"] == {"pairs": 48, "people": 4, "seeds": 1}
    assert content["methods"]["one_score"]["pooled"][0] == 0.5  # no response is in both files
    kept = json.loads((out / "cells" / "personalized-0.json").read_text())
    right = (np.sign(kept["own"]) + 1) / 2
    assert content["methods"]["personalized"]["pooled"][0] == pytest.approx(right.mean())
    assert content["methods"]["personalized"]["gain_over_generic"] is not None
    assert kept["own"] != kept["generic"]
    monkeypatch.setattr(baselines, "measure", lambda *_: pytest.fail("a finished cell was run again"))
    baselines.main(words)
    config.write_text(CONFIG.replace("batch_size: 8", "batch_size: 4"))
    with pytest.raises(SystemExit, match="another configuration"):
        baselines.main(words)
    capsys.readouterr()
