"""`generate --best_of` and `make-pairs`: answers that a reward model ranks, and pairs made of them."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer, write_votes
from short_runs import fit, reward_config, run_config

from prlhf_lightning.analysis.judges import Judge
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.make_pairs import make_pairs as make_pairs_of
from prlhf_lightning.cli.models import load_module, open_writer
from prlhf_lightning.cli.prompt_rows import rows_of_training
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.inference.best_of import candidate_seed
from prlhf_lightning.reports.run import data_of, open_run
from prlhf_lightning.training.reward_scorer import RewardScorer
from prlhf_lightning.utils.journal import Journal

USERS = {"ann": 12, "bob": 12}
SHORT = ["--device", "cpu", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def base(model_path, tmp_path_factory):
    """A small model with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(model_path, folder, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """A policy and a reward model of the same votes."""
    folder = tmp_path_factory.mktemp("policy")
    votes = write_votes(folder / "votes.jsonl", USERS)
    policy = fit(folder, run_config(folder, {"model": base}, votes, model={"cache_reference": False}))
    folder = tmp_path_factory.mktemp("reward")
    return policy, fit(folder, reward_config(folder, base, votes, data={"ties": "drop"}))


@pytest.fixture
def prompts(tmp_path):
    rows = [{"user_id": user, "prompt": prompt} for user in USERS for prompt in ("the cat", "red sun", "a")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(models, *options):
    main(["generate", "--model", str(models[0]), "--reward_model", str(models[1]), *SHORT, *options])


def make_pairs(models, output, *options):
    by = () if "--judge" in options else ("--reward_model", str(models[1]))
    main(["make-pairs", "--model", str(models[0]), *by, *SHORT, "--output", str(output), *map(str, options)])


def rewards_of(models, user, prompt, seed, count):
    """Answers that are written and scored one by one, by reward."""
    writer, scorer = open_writer(models[0]), RewardScorer.load(models[1])
    found = {}
    for number in range(count):
        how = {"max_new_tokens": 6, "temperature": 1.0, "seed": candidate_seed(seed, number)}
        text = writer.generate([GenerationRequest(prompt, user, **how)])[0].text
        if text.strip():
            found[text] = float(scorer.score([user], [prompt], [text]))
    return found


def test_the_answer_with_the_highest_reward_is_written(models, prompts, tmp_path, capsys):
    options = ["--best_of", "5", "--temperature", "1", "--seed", "7", "--keep_candidates", "true"]
    generate(models, "--prompts", str(prompts), *options, "--output", str(tmp_path / "out.jsonl"))
    assert "of the best of 5" in capsys.readouterr().err
    for row in read(tmp_path / "out.jsonl"):
        expected = rewards_of(models, row["user_id"], row["prompt"], 7, 5)
        found = {one["completion"]: one["reward"] for one in row["candidates"] if one["reward"] is not None}
        assert found == pytest.approx(expected, abs=1e-4)
        assert row["reward"] == pytest.approx(max(expected.values()), abs=1e-4)
        assert found[row["completion"]] == row["reward"]


def test_the_best_of_one_prompt_is_printed(models, capsys):
    generate(models, "--prompt", "the cat", "--user", "ann", "--best_of", "4", "--temperature", "1", "--seed", "0")
    best = max((found := rewards_of(models, "ann", "the cat", 0, 4)), key=found.get)
    assert capsys.readouterr().out == best + "\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--best_of", "4"], "temperature is 0, so all 4 answers to a prompt would be equal"),
        (["--best_of", "0"], "it must be 1 or more"),
        (["--keep_candidates", "true"], "candidates are written to --output"),
    ],
)
def test_what_cannot_be_the_best_is_refused(models, options, says):
    with pytest.raises(SystemExit, match=says):
        generate(models, "--prompt", "a", *options)


def test_best_of_needs_a_reward_model(models):
    with pytest.raises(SystemExit, match="Give a reward model with --reward_model"):
        main(["generate", "--model", str(models[0]), "--prompt", "a", "--best_of", "2", "--temperature", "1"])


def test_pairs_are_the_best_against_the_worst(models, prompts, tmp_path, capsys):
    make_pairs(models, tmp_path / "pairs.jsonl", "--prompts", prompts, "--num_answers", "6")
    scorer = RewardScorer.load(models[1])
    rows = read(tmp_path / "pairs.jsonl")
    assert "pairs of 2 users are in" in capsys.readouterr().out
    assert len(rows) >= 4
    for row in rows:
        both = [row["chosen"], row["rejected"]]
        chosen, rejected = scorer.score([row["user_id"]] * 2, [row["prompt"]] * 2, both).tolist()
        assert row["margin"] == pytest.approx(chosen - rejected, abs=1e-4)
        assert row["margin"] > 0


class LikesShort(Judge):
    """Prefers shorter answers, and keeps what it was told about users."""

    def __init__(self):
        self.told = {}

    def judge(self, prompt, user, a, b):
        self.told[user.user_id] = user
        return "tie" if len(a) == len(b) else "a" if len(a) < len(b) else "b"


def test_a_judge_who_knows_votes_can_choose(models, tmp_path):
    judge, how = LikesShort(), {"device": "cpu", "max_new_tokens": 6, "num_answers": 4, "prompts_per_user": 2}
    make_pairs_of(models[0], tmp_path / "pairs.jsonl", judge=judge, **how)
    rows = read(tmp_path / "pairs.jsonl")
    assert rows
    assert all(len(row["chosen"]) < len(row["rejected"]) and 0 < row["margin"] <= 1 for row in rows)
    assert {user: len(person.votes) for user, person in judge.told.items()} == dict.fromkeys(USERS, 8)


def test_pairs_of_hashed_users_have_pseudonyms(models, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUDY_SALT", "0123456789abcdef")
    make_pairs(models, tmp_path / "pairs.jsonl", "--prompts", prompts, "--hash_user_ids_with", "STUDY_SALT")
    pseudonyms = set(map(Pseudonyms(b"0123456789abcdef"), USERS))
    assert {row["user_id"] for row in read(tmp_path / "pairs.jsonl")} <= pseudonyms
    said = capsys.readouterr()
    assert "train on them with --data.hash_user_ids_with null" in said.out
    assert "Users unknown to the reward model" in said.err


def test_a_stopped_command_continues_to_the_same_file(models, prompts, tmp_path, monkeypatch, capsys):
    options = ["--prompts", prompts, "--num_answers", "4"]
    make_pairs(models, tmp_path / "whole.jsonl", *options)
    add = Journal.add

    def stopped(self, key, result):
        if len(self.results) == 2:
            raise KeyboardInterrupt
        add(self, key, result)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        with pytest.raises(SystemExit):
            make_pairs(models, tmp_path / "again.jsonl", *options)
    assert not (tmp_path / "again.jsonl").exists()
    capsys.readouterr()
    make_pairs(models, tmp_path / "again.jsonl", *options)
    assert "2 of 6 rows are done already" in capsys.readouterr().err
    assert read(tmp_path / "again.jsonl") == read(tmp_path / "whole.jsonl")
    assert not (tmp_path / "again.jsonl.progress").exists()


def test_fit_takes_the_pairs_of_a_run_unchanged(models, base, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(models, pairs, "--num_answers", "4", "--prompts_per_user", "3")
    users = [row["user_id"] for row in read(pairs)]
    assert 0 < max(map(users.count, USERS)) <= 3
    fit(tmp_path, run_config(tmp_path, {"model": base}, pairs), "--init_from", str(models[0]))


def test_rows_held_out_for_validation_give_no_pairs(models, tmp_path):
    data = data_of(open_run(models[0]), None, load_module(models[0], "model"))
    held_out = sum(len(data.evaluation_pairs(name) or ()) for name in ("seen", "unseen"))
    assert held_out
    assert len(list(rows_of_training(data))) == sum(USERS.values()) - held_out


def test_conversations_stay_conversations(models, tmp_path):
    prompt = [{"role": "user", "content": "the cat"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"user_id": "ann", "prompt": prompt}) + "\n")
    make_pairs(models, tmp_path / "pairs.jsonl", "--prompts", tmp_path / "in.jsonl")
    (row,) = read(tmp_path / "pairs.jsonl")
    assert row["prompt"] == prompt
    for message in (*row["chosen"], *row["rejected"]):
        assert message["role"] == "assistant"
    assert parse_record(row, "pairs.jsonl:1").chosen == row["chosen"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num_answers", "1"], "a pair needs 2 or more"),
        (["--temperature", "0"], "temperature is 0"),
        (["--min_margin", "-1"], "min_margin is -1.0; it must be 0 or more"),
        (["--judge", "UtilityJudge"], "these are of FileSource"),
    ],
)
def test_what_makes_no_pairs_is_refused(models, tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        make_pairs(models, tmp_path / "pairs.jsonl", *options)


def test_other_outputs_than_jsonl_are_refused(models, tmp_path):
    with pytest.raises(SystemExit, match=r"does not end in .jsonl"):
        make_pairs(models, tmp_path / "pairs.csv")
