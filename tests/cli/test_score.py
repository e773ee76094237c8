"""The `score` command: rows in, the same rows with rewards out."""

from __future__ import annotations

import csv
import json
import math

import pytest
from conftest import write_votes
from short_runs import fit, reward_config

from prlhf_lightning.cli import score as command
from prlhf_lightning.cli.main import main
from prlhf_lightning.training import load_scorer

TEXTS = ["sun", "dog ran fast", "moon yes"]


@pytest.fixture(scope="module")
def checkpoint(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    votes = write_votes(folder / "votes.jsonl", {"ann": 60, "bob": 60})
    config = reward_config(folder, model_path, votes)
    config["data"] |= {"max_completion_length": 6, "overlong": "drop"}
    return fit(folder, config)


@pytest.fixture
def scored(checkpoint, tmp_path, capsys):
    """Write rows to a file, score it, and return the rows of the output and what was printed."""

    def run(rows, *options, name="rows.jsonl"):
        if rows is not None:
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
        places = ["--data", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]
        with pytest.raises(SystemExit) as end:
            main(["score", "--reward_model", str(checkpoint), "--device", "cpu", *places, *options])
        assert not end.value.code, end.value.code
        assert not (tmp_path / "out.jsonl.progress").exists()
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], capsys.readouterr().err

    return run


def rewards(checkpoint, user, texts):
    return load_scorer(checkpoint).score([user] * len(texts), ["the cat"] * len(texts), texts).tolist()


def test_candidates_get_rewards_and_a_ranking_for_their_user(scored, checkpoint):
    rows = [{"user_id": user, "prompt": "the cat", "completions": TEXTS, "note": 1} for user in ("ann", "eve")]
    found, told = scored(rows)
    for row, one in zip(rows, found, strict=True):
        assert one["rewards"] == pytest.approx(rewards(checkpoint, row["user_id"], TEXTS), abs=1e-6)
        assert [one["rewards"][n] for n in one["ranking"]] == sorted(one["rewards"], reverse=True)
        assert {name: one[name] for name in row} == row
    assert [one["known_user"] for one in found] == [True, False]
    assert "eve" in told


def test_a_pair_gets_both_rewards_and_their_probability(scored, checkpoint, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["worker", "prompt", "chosen", "rejected"], ["ann", "the cat", *TEXTS[:2]]])
    (one,), _ = scored(None, "--columns", "{user_id: worker}", name="rows.csv")
    chosen, rejected = rewards(checkpoint, "ann", TEXTS[:2])
    assert (one["chosen_reward"], one["rejected_reward"]) == pytest.approx((chosen, rejected), abs=1e-6)
    assert one["probability"] == pytest.approx(math.exp(chosen) / (math.exp(chosen) + math.exp(rejected)), abs=1e-6)


def test_rows_may_be_scored_for_the_generic_user(scored, checkpoint):
    (one,), _ = scored([{"prompt": "the cat", "completion": "sun"}], "--generic", "true")
    assert one["reward"] == pytest.approx(rewards(checkpoint, "nobody", ["sun"])[0], abs=1e-6)


def test_a_text_without_a_reward_is_written_and_not_ranked(scored):
    found, told = scored([{"user_id": "ann", "prompt": "the cat", "completions": ["sun", "sun " * 9, "moon"]}])
    assert found[0]["rewards"][1] is None
    assert sorted(found[0]["ranking"]) == [0, 2]
    assert found[0]["problem"] == "completions[1]: completion has 10 tokens, limit 6"
    assert "rows.jsonl:1: completions[1]: completion has 10 tokens" in told


def test_a_malformed_row_stops_before_texts_are_scored(scored, tmp_path):
    rows = [{"user_id": "ann", "prompt": "the cat", "completions": ["sun", 3]}, {"user_id": "ann", "prompt": "a"}]
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(AssertionError, match=r"rows.jsonl:1: field 'completions\[1\]'"):
        scored(rows)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    found, told = scored([*rows, {"user_id": "ann", "prompt": "a", "completion": "sun"}], "--on_error", "report")
    assert [one["reward"] is None for one in found] == [True, True, False]
    assert "'completion' is missing" in found[1]["problem"]
    assert "2 rows" in told


def test_a_stopped_command_goes_on_where_it_was(scored, monkeypatch):
    rows = [{"user_id": "ann", "prompt": "the cat", "completion": text} for text in TEXTS]
    whole, _ = scored(rows)
    monkeypatch.setattr(command, "_BLOCK", 1)
    results, done = command._results, []

    def stops(scorer, block):
        done.append(block[0].row["completion"])
        if done == TEXTS[:2]:
            raise KeyboardInterrupt
        return results(scorer, block)

    monkeypatch.setattr(command, "_results", stops)
    with pytest.raises(AssertionError):
        scored(rows)
    assert scored(None)[0] == [pytest.approx(one) for one in whole]
    assert done == [*TEXTS[:2], *TEXTS[1:]]
