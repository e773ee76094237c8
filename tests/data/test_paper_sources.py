"""The data sets of arXiv:2402.05133, read from files in their original schemas, by its protocols."""

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from original_files import (
    PROFILES,
    comparison,
    comparisons,
    dialogue,
    respondent,
    write_jsonl,
    write_koala,
    write_prism,
    write_psoups,
)

from prlhf_lightning.data import PersonalizedSoupsSource, PRISMSource, TLDRSource
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

WORKERS = {f"w{i}": 20 - i for i in range(12)}  # w0 is the most active, w11 the least


def rows(source, split="train"):
    return [row for _, row in source.rows(split)]


def policy(number, worker, name, split="train"):
    row = comparison(number, worker, split)
    row["summaries"][0]["policy"] = name
    return row


@pytest.fixture
def batches(tmp_path):
    """Two files, in which the splits are mixed, as in the original."""
    train = comparisons(WORKERS)
    other = [policy(500 + i, "w11", name) for i, name in enumerate(["ref", "sup4_ppo_rm4_kl6", "cnndm_sup4"] * 10)]
    held_out = comparisons({"w0": 3, "w4": 3, "w11": 2}, "valid1", 1000) + comparisons({"new": 2}, "valid2", 2000)
    equal = comparison(3000, "w0")
    equal["summaries"][1]["text"] = equal["summaries"][0]["text"]
    files = [tmp_path / "batch3.json", tmp_path / "batch12.json"]
    write_jsonl(files[0], train[:100] + held_out)
    write_jsonl(files[1], train[100:] + other + [equal])
    return files


PROTOCOL = {"policies": "supervised", "most_active": 10, "taste": "length"}


def test_tldr_keeps_ten_most_active_supervised_policy_workers(batches):
    source = TLDRSource(batches, **PROTOCOL)
    assert Counter(row["user_id"] for row in rows(source)) == {f"w{i}": 20 - i for i in range(10)}
    assert source.counts("train") == {
        "left out (not by supervised policies)": 30,
        "left out (not by the 10 most active workers)": 10 + 9,
        "left out (equal summaries)": 1,
    }
    held_out = Counter(row["user_id"] for row in rows(source, "validation"))
    assert held_out == {"w0": 3, "w4": 3, "w11": 2, "new": 2}  # the last two are unseen


def test_tldr_tastes_are_those_that_the_authors_drew(batches):
    source = TLDRSource(batches, **PROTOCOL)
    assert source.ranking[:10] == [f"w{i}" for i in range(10)]
    assert [int(source.prefers_shorter[worker]) for worker in source.ranking[:10]] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    for row in rows(source) + rows(source, "validation"):
        assert (len(row["chosen"]) < len(row["rejected"])) == source.prefers_shorter[row["user_id"]]


def test_tldr_of_realistic_workers_has_the_authors_counts(tmp_path):
    train = [5245, 2920, 2437, 2366, 2200, 2126, 1824, 1606, 1366, 1209]  # data/tldr_dataset.ipynb, cell 8
    held_out = [1175, 643, 381, 604, 586, 360, 321, 263, 177, 411]
    content = comparisons({f"w{i}": n for i, n in enumerate(train)})
    content += comparisons({f"w{i}": n for i, n in enumerate(held_out)}, "valid2")
    source = TLDRSource(write_jsonl(tmp_path / "batch.json", content), **PROTOCOL)
    for split, longer, shorter in (("train", 16_607, 6_692), ("validation", 3_371, 1_550)):
        assert Counter(len(row["chosen"]) > len(row["rejected"]) for row in rows(source, split)) == {
            True: longer,
            False: shorter,
        }


def test_tldr_of_summaries_of_one_length_prefers_the_first(tmp_path):
    even = comparison(0, "w0")
    for summary, text in zip(even["summaries"], (" one two", " two one"), strict=True):
        summary["text"] = text
    path = write_jsonl(tmp_path / "batch.json", [even, comparison(1, "w0", "valid1")])
    for seed in range(5):
        (row,) = rows(TLDRSource(path, taste="length", taste_seed=seed))
        assert row["chosen"] == " one two"


def test_tldr_by_default_is_what_all_workers_chose(batches):
    source = TLDRSource(batches)
    train = rows(source)
    assert len(train) == sum(WORKERS.values()) + 30
    assert train[0] == {
        "user_id": "w0",
        "prompt": "SUBREDDIT: r/tifu\nTITLE: a\nPOST: a a a\nTL;DR: ",
        "chosen": " the a",
        "rejected": " a a a a a",
    }


def test_tldr_prompts_of_news_articles_have_no_subreddit(tmp_path):
    info = {"id": "1", "site": "cnn", "title": "T", "article": "A {title}", "post": None, "subreddit": None}
    path = write_jsonl(tmp_path / "batch.json", [comparison(0, "w0", info=info)])
    (row,) = rows(TLDRSource(path))
    assert row["prompt"] == "TITLE: T\nPOST: A {title}\nTL;DR: "


def test_tldr_loads_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    held_out = comparisons({"w0": 2, "new": 1}, "valid1", 900)
    for split, content in (("train", comparisons(WORKERS)), ("validation", held_out)):
        path = folder / "comparisons" / split / "0000.parquet"  # as in the hub's conversion
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    source = TLDRSource(hub=str(folder), **PROTOCOL)
    (where, first), *_ = source.rows("train")
    assert where == f"{folder}/comparisons/train/*[train]:1"
    assert first["user_id"] == "w0"
    assert len(rows(source)) == sum(20 - i for i in range(10))
    assert len(rows(source, "validation")) == 3


def test_a_protocols_settings_change_the_fingerprint(batches):
    prints = {TLDRSource(batches, **settings).fingerprint("train") for settings in ({}, PROTOCOL, {"taste_seed": 1})}
    assert len(prints) == 3


# ---- Personalized Soups


def test_psoups_users_are_six_files_without_repeats_or_ties(tmp_path):
    source = PersonalizedSoupsSource(write_psoups(tmp_path, per_user=4))
    assert Counter(row["user_id"] for row in rows(source)) == {str(i): 4 for i in range(1, 7)}
    assert source.counts("train") == {
        "left out (equal completions)": 6,
        "left out (repeated comparisons)": 24,
    }


def test_psoups_prompts_do_not_tell_the_preference(tmp_path):
    train = rows(PersonalizedSoupsSource(write_psoups(tmp_path), prompt_format="<|user|>\n{prompt} \n<|assistant|>\n"))
    assert train[0]["prompt"] == "<|user|>\na a a \n<|assistant|>\n"
    assert train[0]["chosen"] == "a a a a"
    assert not any(sentence in row["prompt"] for row in train for sentence in PROFILES.values())


def test_psoups_files_that_were_mixed_up_are_refused(tmp_path):
    write_psoups(tmp_path)
    (tmp_path / "P1A.json").rename(tmp_path / "P2A.json")
    (tmp_path / "P1A.json").write_text(json.dumps([{"user_input": "x", "completion_a": "a", "completion_b": "b"}]))
    with pytest.raises(FeedbackFormatError, match=r"P1A\.json: no 'user_input' states 'Generate a response that can"):
        rows(PersonalizedSoupsSource(tmp_path))


def test_psoups_koala_prompts_are_to_be_answered(tmp_path):
    koala = write_koala(tmp_path / "koala_eval_50.json")
    source = PersonalizedSoupsSource(write_psoups(tmp_path), koala, prompt_format="Q: {prompt}")
    places, prompts = zip(*source.prompts(), strict=True)
    assert prompts[1].startswith("Q: ")
    assert len(prompts) == 3
    assert places[0] == f"{koala}:1, row 1"


# ---- PRISM


def authors_division(survey, conversations):
    """Split as data/prism_dataset.ipynb of github.com/HumainLab/Personalized_RLHF does."""
    of_user = {person["user_id"]: [] for person in survey if person["num_completed_conversations"]}
    for one in conversations:
        of_user[one["user_id"]].append(one["conversation_id"])
    np.random.seed(123)
    users = np.array(list(of_user))
    np.random.shuffle(users)
    train, test, seen = [], [], []
    for user in users[: int(len(users) * 0.9)]:
        ids = np.array(of_user[user])
        np.random.shuffle(ids)
        train += ids[: int(len(ids) * 0.9)].tolist()
        test += ids[int(len(ids) * 0.9) :].tolist()
        seen += [user] if len(ids) > 1 else []
    test += [one for user in users[int(len(users) * 0.9) :] for one in of_user[user]]
    return set(train), set(test), set(seen)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prism_is_divided_as_the_authors_divided_it(tmp_path):
    folder = write_prism(tmp_path, users=40, dialogues=12)
    train, test, seen = authors_division(read(folder / "survey.jsonl"), read(folder / "conversations.jsonl"))
    source = PRISMSource(folder)
    lines = {f"{folder / 'conversations.jsonl'}:{i + 1}": f"c{i}" for i in range(len(train) + len(test))}
    assert {lines[where] for where, _ in source.rows("train")} == train
    assert {lines[where] for where, _ in source.rows("validation")} == test
    assert {row["user_id"] for row in rows(source)} == seen
    assert len(rows(source)) == 4 * len(train)  # three other replies in the first turn, one in the second


def test_prism_prompts_hold_the_dialogue_of_chosen_replies(tmp_path):
    write_jsonl(tmp_path / "survey.jsonl", [respondent("ann", 2)])
    talks = [dialogue(i, "ann") for i in range(2)]
    write_jsonl(tmp_path / "conversations.jsonl", talks)
    row = rows(PRISMSource(tmp_path, unseen_user_fraction=0.0, held_out_fraction=0.0))[3]
    first, second = (talks[0]["conversation_history"][i]["content"] for i in (0, 1))
    assert row["prompt"] == [
        {"role": "user", "content": first},
        {"role": "assistant", "content": second},
        {"role": "user", "content": talks[0]["conversation_history"][5]["content"]},
    ]
    assert row["chosen"] == [{"role": "assistant", "content": talks[0]["conversation_history"][6]["content"]}]
    assert row["rejected"] == [{"role": "assistant", "content": talks[0]["conversation_history"][7]["content"]}]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {},
            "preference: helpfulness, personalization, safety; self_description: user0 likes the sun; "
            "age: 25-34 years old; gender: Female; education: University Bachelors Degree; employment: Working "
            "full-time; marital: Never been married; english_proficiency: Fluent; ",
        ),
        ({"preferences": "displayed", "user_text_template": "{preferences}"}, "values, creativity, fluency"),
        ({"user_text_template": "Act so: {system_string}"}, "Act so: Be fast."),
        ({"user_text_template": None}, None),
    ],
)
def test_prism_states_about_a_user_what_the_template_asks_for(tmp_path, settings, text):
    source = PRISMSource(write_prism(tmp_path, users=2), **settings)
    assert text in {row["user_text"] for row in rows(source, "validation") + rows(source)}


def test_prism_counts_what_is_left_out(tmp_path):
    write_jsonl(tmp_path / "survey.jsonl", [respondent("ann", 5)])
    long, equal, alone, short, none = talks = [dialogue(i, "ann") for i in range(5)]
    long["conversation_history"][2]["content"] = "x" * 2300
    equal["conversation_history"][3]["content"] = equal["conversation_history"][1]["content"]
    del alone["conversation_history"][7]
    short["conversation_history"][6]["if_chosen"] = False
    none["conversation_history"] = none["conversation_history"][:2]
    write_jsonl(tmp_path / "conversations.jsonl", talks)
    source = PRISMSource(tmp_path, unseen_user_fraction=0.0, held_out_fraction=0.0)
    assert len(rows(source)) == 3 + 3 + 3 + 3
    assert source.counts("train") == {
        "left out (over max_characters=2300)": 1,
        "left out (equal replies)": 1,
        "turns left out (no other reply)": 1,
        "dialogues cut short (a turn without a message or a chosen reply)": 1,
        "dialogues left out (no usable turn)": 1,
    }


def test_prism_loads_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_prism(tmp_path / "prism")
    here, there = PRISMSource(folder), PRISMSource(hub=str(folder))
    for split in ("train", "validation"):
        assert rows(there, split) == rows(here, split)


# ---- malformed files


def set_in(row, path, value):
    *way, last = path
    for key in way:
        row = row[key]
    if value is None:
        del row[last]
    else:
        row[last] = value


BAD_COMPARISONS = [
    (
        ("summaries", 0, "policy"),
        None,
        r"field 'summaries\[0\]\.policy' is missing from .*; read the original",
    ),
    (("summaries", 1, "text"), 7, r"field 'summaries\[1\]\.text' is a whole number where .* has a string"),
    (("summaries",), ["x"], r"field 'summaries\[0\]' is a string where .* has an object"),
    (("worker",), None, "field 'worker' is missing"),
    (("choice",), 2, "field 'choice' is 2, neither 0 nor 1"),
    (("choice",), True, "field 'choice' is true or false where .* has a whole number"),
    (("split",), "test", "field 'split' is none of train, valid1, valid2"),
    (("info", "post"), None, r"field 'info\.post' is missing"),
    (("info",), "x", "field 'info' is a string where .* has an object"),
    (("worker",), "\ud800", "field 'worker' holds U\\+D800"),
]


@pytest.mark.parametrize(("path", "value", "says"), BAD_COMPARISONS)
def test_a_malformed_comparison_is_named_with_its_line(tmp_path, path, value, says):
    bad = comparison(1, "w1")
    set_in(bad, path, value)
    file = write_jsonl(tmp_path / "batch.json", [comparison(0, "w0"), bad])
    with pytest.raises(FeedbackFormatError, match=rf"batch\.json:2: {says}"):
        rows(TLDRSource(file))


BAD_DIALOGUES = [
    (("user_id",), "nobody", "field 'user_id' is no user of the survey who completed a conversation"),
    (("conversation_history", 1, "if_chosen"), None, r"field 'conversation_history\[1\]\.if_chosen' is missing"),
    (("conversation_history", 0, "turn"), 9, r"history\[0\]\.turn' is 9, but 'conversation_turns' is 2"),
    (("conversation_turns",), None, "field 'conversation_turns' is missing"),
    (("conversation_history",), "x", "field 'conversation_history' is a string where .* has a list"),
]


@pytest.mark.parametrize(("path", "value", "says"), BAD_DIALOGUES)
def test_a_malformed_dialogue_is_named_with_its_line(tmp_path, path, value, says):
    folder = write_prism(tmp_path)
    talks = read(folder / "conversations.jsonl")
    set_in(talks[2], path, value)
    write_jsonl(folder / "conversations.jsonl", talks)
    with pytest.raises(FeedbackFormatError, match=rf"conversations\.jsonl:3: .*{says}"):
        rows(PRISMSource(folder))


@pytest.mark.parametrize("column", ["self_description", "age", "stated_prefs", "num_completed_conversations"])
def test_a_malformed_survey_is_named_by_line_but_not_quoted(tmp_path, column):
    folder = write_prism(tmp_path)
    survey = read(folder / "survey.jsonl")
    survey[1][column] = ["SECRET"]
    write_jsonl(folder / "survey.jsonl", survey)
    with pytest.raises(FeedbackFormatError, match=rf"survey\.jsonl:2: field '{column}' is a list") as error:
        rows(PRISMSource(folder))
    assert "SECRET" not in str(error.value)


def test_a_person_who_stands_in_the_survey_twice_is_named(tmp_path):
    folder = write_prism(tmp_path)
    write_jsonl(folder / "survey.jsonl", [respondent("user0"), respondent("user0")])
    with pytest.raises(FeedbackFormatError, match=r"survey\.jsonl:2: field 'user_id' stands in an earlier row too"):
        rows(PRISMSource(folder))


def test_a_malformed_soup_is_named_with_its_line(tmp_path):
    write_psoups(tmp_path)
    (tmp_path / "P2B.json").write_text('[{"user_input": "x", "completion_a": "a"}]')
    with pytest.raises(FeedbackFormatError, match=r"P2B\.json:1, row 1: field 'completion_b' is missing"):
        rows(PersonalizedSoupsSource(tmp_path))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TLDRSource(policies="some"), "policies is 'some'; it must be one of"),
        (lambda: TLDRSource(most_active=0), "most_active is 0"),
        (lambda: TLDRSource(shorter_fraction=2), "shorter_fraction is 2"),
        (
            lambda: TLDRSource(post_format="{body}"),
            r"post_format has a placeholder \{body\}; available are \{subreddit\}",
        ),
        (lambda: PersonalizedSoupsSource("x", prompt_format="prompt"), "prompt_format has no placeholder"),
        (lambda: PRISMSource("x", user_text_template="{name}"), r"has a placeholder \{name\}"),
        (lambda: PRISMSource("x", preferences="top"), "preferences is 'top'"),
        (lambda: PRISMSource("x", unseen_user_fraction=1.0), "unseen_user_fraction is 1.0"),
    ],
)
def test_impossible_settings_are_refused(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()
