import json
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from feedback_helpers import byte_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import TEXT, VALUES

from prlhf_lightning.data import PoolSource, PreferenceDataModule
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.sources.candidate_pool import Candidates, pairs_in_random_order
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError, PRLHFError
from prlhf_lightning.simulation import scores
from prlhf_lightning.simulation.users import apportion, draw_votes

LENGTH = [{"characters": 1.0}, {"characters": -1.0}]
FEW = {"num_users": 6, "votes_per_user": 20, "num_unseen_users": 2, "validation_votes_per_user": 5}


def answers(number, count=4):
    draw = Random(number)
    return [" ".join(draw.choices(["a", "some", "longer", "word!"], k=draw.randint(1, 12))) for _ in range(count)]


@pytest.fixture
def pool(tmp_path):
    rows = [{"prompt": f"question {i}", "responses": answers(i), "stars": [1, 2, 3, 4]} for i in range(50)]
    return write_jsonl(tmp_path / "pool.jsonl", rows)


def rows(source, split="train"):
    return [row for _, row in source.rows(split)]


def excited(prompt, answer):
    return answer.count("!")


class Mentions:
    def __init__(self, word):
        self.word = word

    def __call__(self, prompt, answer):
        return answer.split().count(self.word)


def test_length_users_choose_longer_and_opposites_shorter(pool):
    source = PoolSource(pool, LENGTH, temperature=1e-6, **FEW)
    groups = {user.user_id: user.group for user in source.users + source.unseen_users}
    assert set(groups.values()) == {0, 1}
    for row in rows(source) + rows(source, "validation"):
        assert (len(row["chosen"]) > len(row["rejected"])) == (groups[row["user_id"]] == 0)


def test_rows_have_no_fault_and_held_out_prompts_do_not_train(pool):
    report = Inspector(PoolSource(pool, LENGTH, **{**FEW, "num_unseen_users": 0}))()
    assert not list(report.problems)
    assert report.splits["train"].rows == 6 * 20
    assert report.splits["train"].prompts <= 40
    assert report.splits["validation"].rows == 6 * 5


def test_a_taste_mixes_scores_in_units_of_their_own_spread(pool):
    source = PoolSource(pool, [{"stars": 1.0, "characters": 1.0}], spread=0.0, temperature=1e-6, **FEW)
    halves = [PoolSource(pool, [{name: 1.0}], **FEW) for name in ("stars", "characters")]
    pooled = [(f"question {i}", answer) for i in range(50) for answer in dict.fromkeys(answers(i))]
    mixed, stars, length = ([one.utility("user-1", *pair) for pair in pooled] for one in (source, *halves))
    assert mixed == pytest.approx([(a + b) / 2**0.5 for a, b in zip(stars, length, strict=True)])


@pytest.mark.parametrize("score", [excited, Mentions("word!")])
def test_any_function_or_object_is_a_score(pool, score):
    source = PoolSource(pool, [{"mine": 2.0}], scores={"mine": score}, temperature=1e-6, **FEW)
    assert all(row["chosen"].count("!") > row["rejected"].count("!") for row in rows(source))
    assert source.utility("user-1", "asked nowhere", "word! word!") == 2 * source.utility("user-1", "x", "word!") > 0


def test_a_column_of_the_pool_is_a_score_of_its_answers_alone(pool):
    source = PoolSource(pool, [{"stars": -1.0}], temperature=1e-6, **FEW)
    order = {f"question {i}": answers(i) for i in range(50)}
    assert all(order[r["prompt"]].index(r["chosen"]) < order[r["prompt"]].index(r["rejected"]) for r in rows(source))
    with pytest.raises(ConfigurationError, match="'stars' is only known for the pool's answers"):
        source.utility("user-1", "question 1", "something else")


def test_noise_of_both_sorts_lowers_the_ceiling(pool):
    many = {**FEW, "num_users": 40}
    sure, unsure = (PoolSource(pool, LENGTH, temperature=t, **many).noise_ceiling("train") for t in (1e-6, 2.0))
    flipped = PoolSource(pool, LENGTH, temperature=1e-6, label_noise=0.2, **many).noise_ceiling("train")
    assert sure == 1
    assert 0.5 < unsure < 0.8
    assert flipped == pytest.approx(0.8, abs=0.06)


def test_votes_have_a_long_tail_and_cold_users_have_few(pool):
    source = PoolSource(pool, LENGTH, **{**FEW, "num_users": 10}, zipf=1.2, num_cold_users=3, votes_per_cold_user=2)
    votes = Counter(row["user_id"] for row in rows(source))
    regular = sorted((count for user, count in votes.items() if user.startswith("user")), reverse=True)
    assert sum(regular) == 10 * 20
    assert regular[0] > 60 > 10 > regular[-1] >= 1
    assert [votes[f"cold-{i}"] for i in (1, 2, 3)] == [2, 2, 2]
    validation = Counter(row["user_id"] for row in rows(source, "validation"))
    assert set(validation.values()) == {5}
    assert len(validation) == 10 + 3 + 2


def test_groups_have_the_requested_sizes_and_opinions(pool):
    source = PoolSource(pool, LENGTH, shares=[3, 1], user_texts=["long", "short"], **{**FEW, "num_users": 8})
    assert Counter(user.group for user in source.users) == {0: 6, 1: 2}
    said = {row["user_id"]: row["user_text"] for row in rows(source)}
    assert said == {user.user_id: ("long", "short")[user.group] for user in source.users}


def test_the_seed_decides_the_rows(pool):
    first, same, other = (PoolSource(pool, LENGTH, seed=seed, **FEW) for seed in (1, 1, 2))
    assert rows(first) == rows(same) != rows(other)
    prints = [source.fingerprint("train") for source in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_follows_a_scores_values_not_its_name(pool):
    prints = {
        PoolSource(pool, [{"mine": 1.0}], scores={"mine": score}, **FEW).fingerprint("train")
        for score in (excited, Mentions("word!"), Mentions("some"))
    }
    assert len(prints) == 2


def test_prompts_with_one_answer_are_left_out_and_counted(tmp_path):
    kept = [{"prompt": f"q{i}", "responses": ["a", "bb"]} for i in range(10)]
    pool = write_jsonl(tmp_path / "pool.jsonl", [*kept, {"prompt": "q", "responses": ["a", "a"]}])
    source = PoolSource(pool, LENGTH, num_users=2, votes_per_user=4, num_unseen_users=0, validation_votes_per_user=1)
    assert Inspector(source)().splits["train"].left_out == {
        "left out (prompts of the pool with fewer than two answers)": 1
    }


def test_every_pair_is_drawn_once():
    candidates = [Candidates(f"p{n}", tuple(map(str, range(n))), ()) for n in (2, 3, 9)]
    drawn = [(one.prompt, *sorted(pair)) for one, pair in pairs_in_random_order(candidates, Random(0))]
    assert len(drawn) == len(set(drawn)) == 1 + 3 + 36


def test_votes_sum_to_the_mean_and_nobody_is_left_out():
    for zipf in (0.0, 1.0, 3.0):
        votes = draw_votes(50, 4, zipf, Random(0))
        assert sum(votes) == 200
        assert min(votes) >= 1
    assert set(draw_votes(5, 4, 0.0, Random(0))) == {4}
    assert apportion(7, [1, 1, 1]) == [3, 2, 2]


@pytest.mark.parametrize("name", scores.SCORES)
def test_scores_are_finite_for_any_text_and_tell_some_apart(name):
    texts = ["", "!", "a b. c d!", "one\n\ntwo\nthree", "word word word", "extraordinary question"]
    values = [scores.SCORES[name]("a question", text) for text in texts]
    assert all(0 <= value < 100 for value in values)
    assert len(set(values)) > 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"responses": ["a", "b"]}, "pool.jsonl:1: field 'prompt' is missing from a pool of answers"),
        ({"prompt": "q", "responses": "a"}, "field 'responses' is a string where a pool of answers has a list"),
        ({"prompt": "q", "responses": ["a", 7]}, r"field 'responses\[1\]' is a whole number"),
        ({"prompt": "q", "responses": ["a", " "]}, r"field 'responses\[1\]' is empty"),
        ({"prompt": "q", "responses": ["a", "b"], "characters": [1]}, "has 1 numbers for 2 responses"),
        ({"prompt": "q", "responses": ["a", "b"], "characters": [1, float("nan")]}, "which is no judgment"),
    ],
)
def test_a_bad_row_of_the_pool_is_named(tmp_path, row, says):
    (tmp_path / "pool.jsonl").write_text(json.dumps(row))
    with pytest.raises(FeedbackFormatError, match=says):
        rows(PoolSource(tmp_path / "pool.jsonl", LENGTH))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": []}, "at least one group"),
        ({"groups": [{"characters": 0.0}]}, "a weight that is not 0"),
        ({"groups": [{"charm": 1.0}]}, "there is no score 'charm'"),
        ({"shares": [1]}, "shares=\\[1\\]; give as many as groups"),
        ({"user_texts": ["x"]}, "user_texts=.*; give as many as groups"),
        ({"temperature": 0}, "temperature=0; give a number above 0"),
        ({"label_noise": 0.5}, "label_noise=0.5; give"),
        ({"votes_per_user": 10_000}, "user-01 needs 10000 pairs in train, but only"),
        ({"validation_fraction": 0.001}, "0 fall to validation"),
        ({"scores": {"mine": lambda prompt, answer: None}, "groups": [{"mine": 1}]}, "'mine' is not a finite number"),
        ({"scores": {"mine": lambda prompt, answer: 5}, "groups": [{"mine": 1}]}, "'mine' is equal for all answers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pool, settings, says):
    with pytest.raises((ConfigurationError, FeedbackFormatError), match=says):
        rows(PoolSource(**{"pool": pool, "groups": LENGTH, **settings}))


def test_it_trains_as_any_source_does(pool):
    data = PreferenceDataModule(PoolSource(pool, LENGTH, num_cold_users=2, **FEW), byte_tokenizer())
    data.prepare_data()
    data.setup("fit")
    assert data.num_users == 1 + 6 + 2
    assert data.eval_sets["validate"] == ("seen", "unseen")


POOLS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT, "responses": st.lists(TEXT, min_size=2, max_size=4)})
    | st.dictionaries(st.sampled_from(["prompt", "responses", "words"]), VALUES | TEXT | st.lists(TEXT | VALUES)),
    min_size=2,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(POOLS)
def test_an_unfit_pool_is_refused_or_votes_are_on_its_content(pool):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "pool.jsonl", pool)
        source = PoolSource(path, [{"words": 1.0}], num_users=1, votes_per_user=1, validation_fraction=0.5)
        try:
            (vote,) = rows(source)
        except PRLHFError:
            return
        asked = [row for row in pool if row["prompt"] == vote["prompt"]]
        assert {vote["chosen"], vote["rejected"]} <= {answer for row in asked for answer in row["responses"]}
