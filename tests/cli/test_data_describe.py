"""The page that `data describe` writes, and what it says there is to personalize."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from prlhf_lightning.analysis.feedback_table import read_table
from prlhf_lightning.cli.data_describe import describe, find_personalization_gain
from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.reports.description import in_words
from prlhf_lightning.reports.description_page import page_of

FOLDER = Path(os.environ.get("PRLHF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def written(path, rows):
    names = ("user_id", "prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, map(str, row), strict=True))) + "\n" for row in rows))
    return str(path)


def one_judge_a_pair(count, taste, seed=0):
    """Votes on answers that nobody else has seen: long ones please every second user only, if there is a taste."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        long, short = (f"{number} " + "word " * int(size) for size in draw.integers((10, 2), (14, 6)))
        likes_long = draw.random() < (0.9 if not taste or number % 2 else 0.1)
        yield (f"user {number % 60}", f"prompt {number % 400}", *((long, short) if likes_long else (short, long)))


@pytest.mark.parametrize(("taste", "verdict"), [(True, "something"), (False, "next to nothing")])
def test_where_no_answer_is_shared_features_tell(tmp_path, taste, verdict):
    path = written(tmp_path / "votes.jsonl", one_judge_a_pair(6000, taste))
    finding = find_personalization_gain(read_table(FileSource(path), ["train"]))
    assert finding.kind == "features"
    assert "prompts" in finding.held_out
    assert finding.headroom.verdict == verdict
    assert verdict in in_words(finding)


def test_a_page_is_written_that_shows_no_text_and_no_user(tmp_path, capsys):
    rows = [(f"secret-user-{n % 7}", "secret prompt", f"secret {a}", f"secret {b}") for n, (a, b) in enumerate(pairs())]
    out = tmp_path / "pages" / "page.html"
    main(
        [
            "data",
            "describe",
            "--train",
            written(tmp_path / "votes.jsonl", rows),
            "--output",
            str(out),
            "--title",
            "<b>&",
        ]
    )
    page = out.read_text()
    assert "secret" not in page
    assert "Feedback: &lt;b&gt;&amp;" in page
    for title in ("to personalize", "Votes a user", "Lengths", "Agreement", "Length bias", "Contradictions"):
        assert re.search(f"<h2>[^<]*{title}", page)
    content = out.with_suffix(".json").read_text()
    assert "secret" not in content
    assert page_of(json.loads(content)).render() == page
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Cannot tell")
    assert said[0].replace("'", "&#39;") in page


def pairs():
    draw = np.random.default_rng(0)
    first = draw.integers(6, size=210)
    return np.stack([first, (first + draw.integers(1, 6, size=210)) % 6], 1)


@pytest.mark.parametrize("rows", [[("u", "p", "x", "y")], [("u", "p", "x", "y"), ("v", "q", "a", "b")]])
def test_a_few_votes_make_a_page_too(tmp_path, rows):
    describe(train=written(tmp_path / "votes.jsonl", rows), output=tmp_path / "page.html")
    assert "too few votes" in (tmp_path / "page.html").read_text()


def test_of_many_votes_some_users_are_fitted_and_it_says_so(tmp_path):
    path = written(tmp_path / "votes.jsonl", one_judge_a_pair(1200, taste=False))
    finding = find_personalization_gain(read_table(FileSource(path), ["train"]), max_votes=600)
    assert "600 votes of 30 users" in finding.remarks[0]


def test_a_validation_file_of_ties_alone_is_as_good_as_none(tmp_path):
    train = written(tmp_path / "votes.jsonl", one_judge_a_pair(400, taste=False))
    ties = written(tmp_path / "ties.jsonl", [("u", "p", "x", "x")])
    table = read_table(FileSource(train, ties), ["train", "validation"])
    assert "prompts" in find_personalization_gain(table).held_out


def test_what_cannot_be_described_is_refused(tmp_path):
    path = written(tmp_path / "votes.jsonl", [("u", "p", "x", "x")])
    with pytest.raises(ConfigurationError, match="no votes"):
        describe(train=path, output=tmp_path / "page.html")
    with pytest.raises(ConfigurationError, match="max_votes"):
        describe(train=path, output=tmp_path / "page.html", max_votes=0)
    with pytest.raises(ConfigurationError, match="seed"):
        describe(train=path, output=tmp_path / "page.html", seed=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "verdict"), [("jester", "something"), ("ukpconvarg", "next to nothing")])
def test_real_people(name, verdict):
    if not (FOLDER / name).exists():
        pytest.skip(f"no {name} data in {FOLDER}")
    source = FileSource(FOLDER / name / "train.jsonl.gz", FOLDER / name / "validation.jsonl.gz")
    found = find_personalization_gain(read_table(source, ["train", "validation"])).headroom
    assert found.verdict == verdict
    if name == "jester":
        assert found.by_vote.shared == pytest.approx(0.701, abs=0.003)
        assert found.by_vote.personal == pytest.approx(0.725, abs=0.005)
