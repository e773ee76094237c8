"""Ratings and rankings become pairs, and what makes no pair is counted."""

import csv
from collections import Counter

import pytest
from feedback_helpers import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data import FileSource, RankingSource, RatingSource
from prlhf_lightning.data.sources.ratings import Pairing, Rated
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


def rated(*scores):
    return [Rated(f"text {i}", score, f"a:{i}") for i, score in enumerate(scores)]


def pairs(pairing, *scores):
    counts = Counter()
    return [(p.chosen.score, p.rejected.score) for p in pairing(rated(*scores), "ann", counts)], dict(counts)


def test_all_pairs_of_different_scores_are_made():
    assert pairs(Pairing(), 3, 1, 2, 2) == ([(3, 1), (3, 2), (3, 2), (2, 1), (2, 1)], {"left out (equal scores)": 1})


def test_adjacent_pairs_are_of_neighbouring_scores():
    assert pairs(Pairing("adjacent"), 9, 1, 4, 4)[0] == [(9, 4), (9, 4), (4, 1), (4, 1)]


def test_pairs_closer_than_the_gap_are_left_out():
    assert pairs(Pairing(min_gap=2), 5, 4, 3) == ([(5, 3)], {"left out (scores closer than min_gap=2)": 2})


def test_the_cap_draws_pairs_by_the_seed_alone():
    kept = [pairs(Pairing(max_pairs=3, seed=seed), *range(8))[0] for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert pairs(Pairing(max_pairs=3), *range(8))[1] == {"left out (over max_pairs=3 of a user and prompt)": 25}


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=7),
    st.sampled_from(["all", "adjacent"]),
    st.none() | st.integers(1, 5),
)
def test_every_pair_is_right_and_made_once(scores, which, cap):
    counts = Counter()
    made = Pairing(which, 0.0, cap)(rated(*scores), "ann", counts)
    assert all(pair.chosen.score > pair.rejected.score for pair in made)
    assert len({(pair.chosen.where, pair.rejected.where) for pair in made}) == len(made)
    if which == "all":
        assert len(made) + sum(counts.values()) == len(scores) * (len(scores) - 1) // 2


RATINGS = [
    ("ann", "p1", "a", "3"), ("bob", "p1", "a", "1"), ("ann", "p1", "b", "1.5"), ("bob", "p1", "b", "5"),
    ("ann", "p2", "a", "2"), ("ann", "p1", "c", "3"), ("bob", "p1", "b", "4"),
]  # fmt: skip


@pytest.fixture
def ratings(tmp_path):
    path = tmp_path / "ratings.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("worker", "prompt", "joke", "stars"), *RATINGS])
    return path


COLUMNS = {"user_id": "worker", "completion": "joke", "rating": "stars"}


def test_ratings_of_any_file_are_paired_by_user_and_prompt(ratings):
    source = RatingSource(FileSource(ratings), COLUMNS)
    made = [(where, row["user_id"], row["chosen"], row["rejected"]) for where, row in source.rows("train")]
    assert made == [
        (f"{ratings}:2 and {ratings}:4", "ann", "a", "b"),
        (f"{ratings}:7 and {ratings}:4", "ann", "c", "b"),
        (f"{ratings}:5 and {ratings}:3", "bob", "b", "a"),
        (f"{ratings}:8 and {ratings}:3", "bob", "b", "a"),
    ]
    assert source.counts("train") == {
        "left out (equal scores)": 1,
        "left out (one completion with two scores)": 1,
    }


def test_inner_sources_may_name_columns_and_low_may_be_good(ratings):
    source = RatingSource(FileSource(ratings, columns=COLUMNS), higher_is_better=False, max_pairs=1)
    assert [row["chosen"] for _, row in source.rows("train")] == ["b", "a"]
    assert source.columns == {}


def test_the_settings_of_ratings_change_the_fingerprint(ratings):
    settings = [{}, {"min_gap": 1}, {"max_pairs": 2}, {"pairs": "adjacent"}, {"higher_is_better": False}, {"seed": 1}]
    sources = [RatingSource(FileSource(ratings), COLUMNS, **each) for each in settings]
    assert len({source.fingerprint("train") for source in sources}) == len(settings)


def test_texts_about_users_are_passed_on(tmp_path):
    one = {"user_id": "ann", "prompt": [{"role": "user", "content": "Hi"}], "user_text": "old"}
    path = write_jsonl(tmp_path / "a.jsonl", [one | {"completion": c, "rating": i} for i, c in enumerate("ab")])
    ((_, row),) = RatingSource(FileSource(path)).rows("train")
    assert row == {"user_id": "ann", "prompt": one["prompt"], "chosen": "b", "rejected": "a", "user_text": "old"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rating": None}, "field 'rating' is null where a rating has a number; name the column"),
        ({"rating": "good"}, "field 'rating' is a string that is no number"),
        ({"rating": "inf"}, "field 'rating' is inf"),
        ({"user_id": [7]}, "field 'user_id' is a list where a rating has a string"),
        ({"completion": {}}, "field 'completion' is an object where a rating has a string"),
        ({"user_text": ["SECRET"]}, "field 'user_text' is a list where a rating has a string"),
    ],
)
def test_a_malformed_rating_is_named(tmp_path, changes, says):
    good = {"user_id": "ann", "prompt": "p", "completion": "c", "rating": 1}
    path = write_jsonl(tmp_path / "a.jsonl", [good, good | changes])
    with pytest.raises(FeedbackFormatError, match=rf"a\.jsonl:2: {says}") as error:
        list(RatingSource(FileSource(path)).rows("train"))
    assert "SECRET" not in str(error.value)


def ranking(**fields):
    return {"user_id": "ann", "prompt": "p", "completions": ["a", "b", "c"], **fields}


@pytest.mark.parametrize(
    ("which", "fields", "expected"),
    [
        ("adjacent", {}, ["ab", "bc"]),
        ("all", {}, ["ab", "ac", "bc"]),
        ("all", {"ranks": [2, 1, 2]}, ["ba", "bc"]),
        ("adjacent", {"ranks": [3, 1, 2]}, ["ca", "bc"]),
    ],
)
def test_rankings_are_paired(tmp_path, which, fields, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [ranking(**fields)])
    source = RankingSource(FileSource(path), pairs=which)
    assert sorted(row["chosen"] + row["rejected"] for _, row in source.rows("train")) == sorted(expected)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"completions": ["a"]}, "field 'completions' has fewer than two completions"),
        ({"completions": "a"}, "field 'completions' is a string where a ranking has a list"),
        ({"completions": ["a", 1]}, r"field 'completions\[1\]' is a whole number"),
        ({"ranks": [1, 2]}, "field 'ranks' must hold one place for each of the 3 completions"),
        ({"ranks": [1, 2, None]}, r"field 'ranks\[2\]' is null"),
    ],
)
def test_a_malformed_ranking_is_named(tmp_path, fields, says):
    path = write_jsonl(tmp_path / "a.jsonl", [ranking(**fields)])
    with pytest.raises(FeedbackFormatError, match=rf"a\.jsonl:1: {says}"):
        list(RankingSource(FileSource(path)).rows("train"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pairs": "some"}, "pairs is 'some'"),
        ({"min_gap": -1}, "min_gap is -1"),
        ({"max_pairs": 0}, "max_pairs is 0"),
        ({"columns": {"stars": "x"}}, "no field 'stars'; the fields are user_id, prompt, completion, rating"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ConfigurationError, match=says):
        RatingSource(FileSource("a.csv"), **settings)
