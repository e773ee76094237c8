"""The page about a trained model."""

from __future__ import annotations

import csv
import json
import shutil
from html.parser import HTMLParser

import pytest
import short_runs
import torch
from conftest import write_votes
from short_runs import run_config

from prlhf_lightning.analysis.judges import Judge, Person, RewardJudge
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.errors import JudgeError
from prlhf_lightning.reports.page import page_of
from prlhf_lightning.reports.user_map import map_users, most_unlike

TEXT = "user likes long answers"


def fit(folder, user_model, source, model, **data):
    config = run_config(
        folder,
        {"model": model},
        "",
        trainer={"val_check_interval": 0.5},
        model={
            "user_model": {"class_path": user_model, "init_args": {"num_tokens": 2}},
            "optim": {"lr": 0.02, "user_lr": 0.5},
            "sampling": {"max_new_tokens": 20},
            "cache_reference": False,
        },
        data={"source": source, "cache_dir": str(folder / "cache"), **data},
    )
    return short_runs.fit(folder, config, "--collapse.prompts", "0")


@pytest.fixture(scope="module")
def run(model_path, tmp_path_factory):
    """A cluster model of eight users, two more are held out."""
    folder = tmp_path_factory.mktemp("report")
    votes = write_votes(folder / "votes.jsonl", {f"<b>u{i}</b>": 16 for i in range(10)})
    source = {"class_path": "FileSource", "init_args": {"train": str(votes)}}
    return fit(folder, "ClusterUserModel", source, model_path, unseen_user_fraction=0.2, validation_fraction=0.3)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    arguments = {"num_users": 4, "pairs_per_user": 10, "validation_pairs_per_user": 12, "num_unseen_users": 2}
    source = {"class_path": "SimulatedSource", "init_args": arguments}
    return fit(folder, "IndividualUserModel", source, "builtin:style-lm", batch_size=10)


class Page(HTMLParser):
    """The texts and the kinds of elements of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text())
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data.strip())


def report(checkpoint, *options, small=True):
    out = checkpoint.parent / "page.html"
    out.unlink(missing_ok=True)
    few = ["--num_users", "3", "--num_prompts", "2", "--max_new_tokens", "8"] if small else []
    main(["report", "--model", str(checkpoint), "--output", str(out), "--device", "cpu", *few, *options])
    return Page(out)


def refusal(checkpoint, *options):
    with pytest.raises(SystemExit) as found:
        report(checkpoint, *options)
    return str(found.value.code)


def known(checkpoint):
    return load_module(checkpoint, "checkpoint").vocabulary.ids


class LongJudge(Judge):
    """Likes long answers."""

    def judge(self, prompt, user, a, b):
        assert user.votes
        return "a" if len(a) > len(b) else "b"


def test_a_run_of_simulated_users_gets_every_section(simulated, capsys):
    page = report(simulated, "--num_users", "2", "--num_prompts", "2", small=False)
    assert page.tags.count("figure") == 7
    assert "UtilityJudge" in page.text
    assert "hidden taste: I like" in page.text
    assert "No map" not in page.text
    assert "No curve" not in page.text
    assert "pair accuracy" in capsys.readouterr().out


def test_the_numbers_of_the_page_stand_beside_it_as_json(run):
    page = report(run, "--judge", f"{__name__}.LongJudge", "--baseline", str(run))
    numbers = json.loads((run.parent / "page.json").read_text())
    assert numbers["in_short"] in page.text
    assert f"{numbers['pair_accuracy']['seen']['own']['value']:.3f}" in page.texts
    price = numbers["price"]  # the baseline is the model itself, which knows its users
    assert price["value"] == pytest.approx(numbers["gain"]["value"])
    assert price["low"] <= price["value"] <= price["high"]
    assert f"a price of {100 * price['value']:+.1f} points ({100 * price['low']:+.1f} to" in page.text
    assert {rate["against"] for rate in numbers["win_rates"]["against"]} >= {"generic user", "before training"}
    assert {user["user"] for user in numbers["map"]["users"]} == {
        f"user {number}" for number in range(1, len(known(run)) + 1)
    }
    assert "<b>u" not in json.dumps(numbers)


@pytest.mark.parametrize("which", ["run", "simulated"])
def test_the_page_is_made_from_the_json_beside_it_alone(which, request):
    checkpoint = request.getfixturevalue(which)
    report(checkpoint)
    content = json.loads((checkpoint.parent / "page.json").read_text())
    assert page_of(content).render() == (checkpoint.parent / "page.html").read_text()


def test_accuracies_are_those_that_training_logged(simulated):
    page = report(simulated)
    rows = list(csv.DictReader((simulated.parent.parent / "metrics.csv").open()))
    for name in ("val/seen/accuracy_user_mean", "val/seen/generic_accuracy", "val/unseen/accuracy"):
        value = [float(row[name]) for row in rows if row[name]][-1]
        assert f"{value:.3f}" in page.texts


def test_files_of_real_users_need_a_judge_named_for_win_rates(run):
    page = report(run)
    assert "No judge was named" in page.text
    assert "cluster 1" in page.text
    assert "true groups" not in page.text


def test_user_names_and_descriptions_appear_only_on_request(run):
    page = report(run)
    assert "<b>u" not in page.text
    assert TEXT not in page.text
    page = report(run, "--show_user_ids", "true", "--show_user_text", "true")
    assert "<b>u" in page.text  # as text
    assert "b" not in page.tags
    assert TEXT in page.text


def test_answers_can_be_left_out(run):
    assert "Prompt:" not in report(run, "--show_answers", "false").text


def test_a_judge_of_ones_own_is_named_by_its_class(run):
    page = report(run, "--judge", f"{__name__}.LongJudge")
    assert "Judge: LongJudge" in page.text


def test_the_model_itself_is_no_judge_to_be_trusted(run):
    page = report(run, "--judge", "RewardJudge", "--judge.model", str(run))
    assert "The judge is the very model that is judged" in page.text


def test_a_reward_does_not_depend_on_the_order_but_on_the_user(run):
    judge = RewardJudge(run)
    judge.prepare(None)
    ann, bob = (Person(user_id, TEXT) for user_id in known(run)[:2])
    margins = [judge.margin("the cat", person, "dog ran", "sun moon") for person in (ann, bob)]
    assert judge.margin("the cat", ann, "sun moon", "dog ran") == pytest.approx(-margins[0], abs=1e-5)
    assert margins[0] != margins[1]
    with pytest.raises(JudgeError, match="does not know this user"):
        judge.margin("the cat", Person("nobody"), "dog ran", "sun moon")


def test_a_checkpoint_by_itself_says_what_is_missing(run, tmp_path):
    alone = shutil.copy(run, tmp_path / "alone.ckpt")
    (tmp_path / "users").mkdir()
    shutil.copy(run.parent.parent / "users_seen.csv", tmp_path / "users")
    page = report(alone, "--title", "Mine & <yours>")
    assert "Mine & <yours>" in page.texts
    assert "Name the run's folder with --run" in page.text
    assert "cluster 1" in page.text
    assert "users_seen.csv" in report(alone, "--run", str(tmp_path / "users")).text


def test_data_can_be_named_for_a_checkpoint_by_itself(run, tmp_path):
    alone = shutil.copy(run, tmp_path / "alone.ckpt")
    ann, bob = known(run)[:2]
    votes = write_votes(tmp_path / "more.jsonl", {ann: 20, bob: 20, "new": 20}, seed=3)
    rest = write_votes(tmp_path / "rest.jsonl", {ann: 6, bob: 6}, seed=4)
    page = report(alone, "--source", "FileSource", "--source.train", str(votes), "--source.validation", str(rest))
    assert "No curve: There are no pairs of users" in page.text
    assert "Prompt:" in page.text


def test_a_baseline_is_ranked_beside_the_model(run):
    assert "baseline without users" in report(run, "--baseline", str(run)).text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run", "no/such"], "there is no folder no/such"),
        (["--num_users", "0"], "num_users is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--output", "/proc/no/page.html"], "/proc/no/page.html cannot be written"),
        (["--judge", "UtilityJudge"], "UtilityJudge knows the users of SimulatedSource"),
        (["--judge", "RewardJudge", "--judge.model", "no.ckpt"], "there is no checkpoint no.ckpt"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run, options, said):
    message = refusal(run, *options)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "data: {source: NoSuchSource}"),
        ("metrics.csv", "step,a\n1,x\n"),
        ("comparison.json", "[1]"),
        ("users_seen.csv", "user,pairs\nann,x\n"),
    ],
)
def test_a_damaged_run_is_said_in_a_line(run, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    message = refusal(run, "--run", str(tmp_path))
    assert name in message
    assert "\n" not in message


def test_the_vanilla_numbers_of_a_run_are_taken_over(run, tmp_path):
    shutil.copytree(run.parent.parent, tmp_path / "copy")
    numbers = {"vanilla": {"val/seen/accuracy_user_mean": 0.777}}
    (tmp_path / "copy" / "comparison.json").write_text(json.dumps(numbers))
    assert "0.777" in report(run, "--run", str(tmp_path / "copy")).texts


def test_the_baseline_that_a_run_kept_is_compared_by_itself(run, tmp_path):
    shutil.copytree(run.parent.parent, tmp_path / "copy")
    (tmp_path / "copy" / "baseline").mkdir()
    shutil.copy(run, tmp_path / "copy" / "baseline" / "last.ckpt")
    page = report(run, "--run", str(tmp_path / "copy"))
    assert "a price of" in page.text
    assert "baseline without users" in page.texts


def test_users_with_like_vectors_stand_together(run):
    module = load_module(run, "checkpoint")
    table = module.user_model.row_tables()[0]
    with torch.no_grad():
        table[1:4], table[4:] = table[1].clone(), table[4].clone()
    found = map_users(module, torch.arange(1, len(table)))
    assert torch.allclose(found.points[0], found.points[2], atol=1e-4)
    assert not torch.allclose(found.points[0], found.points[4], atol=1e-2)
    assert found.explained[0] == pytest.approx(1.0, abs=1e-4)


def test_users_who_are_shown_are_unlike():
    vectors = torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [0, 4]])
    assert most_unlike(vectors, 3) == [0, 2, 3]
    assert most_unlike(vectors, 9)[:3] == [0, 2, 3]
