"""The report on a reward model: its numbers against others' computation of them, and what it says without them."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import write_thumbs, write_votes
from short_runs import fit, reward_config

from prlhf_lightning.adaptation import adapt_heads, cold_start_heads
from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource
from prlhf_lightning.reports.reward_model import Judgments, calibration, length_bias, page_of_rewards
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule, load_scorer

USERS = {"ann": 40, "bob": 40, "cy": 40, "dee": 40}
NEW = {"eve": 24, "fay": 24}


def run_of(folder, model_path, **model):
    train = write_votes(folder / "votes.jsonl", USERS)
    held_out = write_votes(folder / "held_out.jsonl", {**USERS, **NEW}, seed=1)
    content = reward_config(folder, model_path, train, model=model)
    content["data"]["source"]["init_args"]["validation"] = str(held_out)
    return fit(folder, content)


@pytest.fixture(scope="module")
def checkpoint(model_path, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("reward"), model_path)


def report(checkpoint, *options):
    """Write the report of a checkpoint; return its numbers and its page."""
    page = checkpoint.parent / "page.html"
    main(["report", "--model", str(checkpoint), "--output", str(page), "--device", "cpu", *map(str, options)])
    return json.loads(page.with_suffix(".json").read_text()), page.read_text()


@pytest.fixture(scope="module")
def numbers(checkpoint):
    return report(checkpoint)[0]


@pytest.fixture(scope="module")
def scored(checkpoint):
    """Each seen user's held-out pairs as margin, and difference of the lengths in words, from the file's own texts."""
    scorer, found = load_scorer(checkpoint), {}
    for line in (checkpoint.parents[3] / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["user_id"] in USERS and row["chosen"] != row["rejected"]:
            texts = [row["chosen"], row["rejected"]]
            chosen, rejected = scorer.score([row["user_id"]] * 2, [row["prompt"]] * 2, texts).tolist()
            longer = len(row["chosen"].split()) - len(row["rejected"].split())
            found.setdefault(row["user_id"], []).append((chosen - rejected, longer))
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_accuracies_are_those_of_the_scored_file(numbers, scored):
    by_user = {user: mean(margin > 0 for margin, _ in pairs) for user, pairs in scored.items()}
    seen = numbers["pair_accuracy"]["seen"]
    assert seen["own"]["value"] == pytest.approx(mean(by_user.values()))
    assert seen["worst_tenth"]["accuracy"] == pytest.approx(min(by_user.values()))
    assert [row["accuracy"] for row in seen["by_user"]] == pytest.approx([by_user[user] for user in sorted(by_user)])
    assert numbers["gain"]["value"] == pytest.approx(seen["own"]["value"] - seen["generic"]["value"])
    assert numbers["gain"]["low"] <= numbers["gain"]["value"] <= numbers["gain"]["high"]


def test_the_calibration_error_is_that_of_the_scored_file(numbers, scored):
    bins = [[] for _ in range(10)]
    for margin, _ in (pair for pairs in scored.values() for pair in pairs):
        sure = max(1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin)))
        bins[min(int((sure - 0.5) / 0.05), 9)].append((sure, margin > 0))
    total = sum(map(len, bins))
    gaps = [len(one) * abs(mean(right for _, right in one) - mean(sure for sure, _ in one)) for one in bins if one]
    found = numbers["calibration"]["seen"]["own"]
    assert found["ece"] == pytest.approx(sum(gaps) / total, abs=1e-4)
    assert [one["pairs"] for one in found["bins"]] == [len(one) for one in bins if one]


def test_length_counts_as_in_the_scored_file(numbers, scored):
    found = numbers["length"]["seen"]
    own = [mean((margin > 0) == (longer > 0) for margin, longer in pairs if longer) for pairs in scored.values()]
    chosen = [mean(longer > 0 for _, longer in pairs if longer) for pairs in scored.values()]
    assert found["longer_wins"]["own"]["value"] == pytest.approx(mean(own))
    assert found["longer_wins"]["choices"]["value"] == pytest.approx(mean(chosen))
    both_orders = [np.array([*pairs, *((-margin, -longer) for margin, longer in pairs)]).T for pairs in scored.values()]
    expected = mean(np.corrcoef(*columns)[0, 1] for columns in both_orders)
    assert found["correlation"]["own"]["value"] == pytest.approx(expected, abs=1e-4)


def test_choices_by_the_probabilities_are_calibrated():
    draw = np.random.default_rng(0)
    margins = draw.normal(size=20_000) * 2
    margins *= np.where(draw.random(20_000) < 1 / (1 + np.exp(-np.abs(margins))), np.sign(margins), -np.sign(margins))
    fair, sure = calibration(margins), calibration(3 * margins)
    assert fair["ece"] < fair["chance"]["high"] < 0.02
    assert sure["ece"] > 0.1
    assert sure["confidence"] > sure["accuracy"] + 0.1


def test_rewards_that_follow_length_alone_are_told():
    draw = np.random.default_rng(0)
    longer = draw.integers(-5, 6, 2000).astype(float)
    users = tuple("abcd"[n % 4] for n in range(2000))
    biased = length_bias(Judgments(users, longer, longer, longer), True)
    assert biased["correlation"]["own"]["value"] == pytest.approx(1)
    assert biased["longer_wins"]["own"]["value"] == 1
    assert biased["excess"]["low"] > 0.2
    blind = length_bias(Judgments(users, np.zeros(2000), longer, longer), True)
    assert blind["excess"]["low"] < 0.5 - blind["longer_wins"]["choices"]["value"] < blind["excess"]["high"]


def test_new_users_are_learned_from_their_first_pairs(checkpoint, tmp_path):
    model = PersonalizedRewardModel.load_from_checkpoint(checkpoint)
    source = FileSource(write_votes(tmp_path / "new.jsonl", NEW, seed=2))
    pairs = RewardDataModule(source, model.backbone.tokenizer, ties="drop").training_pairs()
    rows = {user: [row for row, one in enumerate(pairs.user_ids) if one == user] for user in NEW}
    learned, tested = (torch.tensor([row for own in rows.values() for row in own[part]]) for part in
                       (slice(0, 12), slice(12, None)))  # fmt: skip
    curve = {point.pairs: point for point in cold_start_heads(model, pairs.select(learned), pairs.select(tested))}
    assert curve[0].accuracy == curve[0].generic
    features = model.features_of(pairs.texts)
    differences = features.dense(pairs.chosen) - features.dense(pairs.rejected)
    accuracies = []
    for own in rows.values():
        (code,) = adapt_heads(model, pairs.select(torch.tensor(own[:5]))).rows
        head = (model.user_model.generic_prompt + code @ model.user_model.basis).flatten()
        accuracies.append(float((differences[own[12:]] @ head > 0).float().mean()))
    assert curve[5].accuracy == pytest.approx(mean(accuracies))


def test_the_page_is_made_from_the_numbers_alone(checkpoint):
    content, page = report(checkpoint)
    assert page_of_rewards(content).render() == page
    assert page.count("<figure") == 3
    assert content["cold_start"][-1]["pairs"] >= 10
    assert "ann" not in json.dumps(content)
    assert "ann" in json.dumps(report(checkpoint, "--show_user_ids", "true")[0])


def test_a_checkpoint_alone_says_what_is_missing(checkpoint, tmp_path):
    content, page = report(shutil.copy(checkpoint, tmp_path / "alone.ckpt"))
    assert (content["calibration"], content["length"], content["cold_start"]) == ({}, {}, None)
    assert page.count("Name the run&#39;s folder with --run") >= 3


def test_a_loss_without_probabilities_has_no_calibration(model_path, tmp_path):
    loss = {"class_path": "BradleyTerryLoss", "init_args": {"gap": 1.0}}
    content, page = report(run_of(tmp_path, model_path, loss=loss, steps=20))
    assert (content["calibration"], content["length"]["seen"]["excess"]) == (None, None)
    assert "BradleyTerryLoss is no likelihood" in page


def test_thumbs_have_no_lengths_to_compare(model_path, tmp_path):
    votes = write_votes(tmp_path / "votes.jsonl", USERS)
    content = reward_config(tmp_path, model_path, write_thumbs(tmp_path / "thumbs.jsonl", votes))
    content["data"] |= {"feedback": "thumbs", "validation_fraction": 0.3}
    found, page = report(fit(tmp_path, content))
    assert found["length"] is None
    assert found["calibration"]["seen"]["own"]["pairs"] > 20
    assert "A thumb has one text" in page


@pytest.mark.parametrize("options", [["--baseline", "x.ckpt"], ["--judge", "UtilityJudge"], ["--max_new_tokens", 4]])
def test_options_about_written_answers_are_refused(checkpoint, options):
    with pytest.raises(SystemExit, match="a reward model writes nothing that could be judged"):
        report(checkpoint, *options)
