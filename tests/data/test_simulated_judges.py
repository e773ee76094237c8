"""Public data sets whose users are simulated or stand for a kind of judge, in the schemas of their files."""

from collections import Counter

import numpy as np
import pytest
from original_files import MODELS, answers, transcripts, write_hh, write_hub_card, write_jsonl, write_ultrafeedback_p

from prlhf_lightning.data import HHRLHFSource, PersonalLLMSource, UltraFeedbackPSource
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


def rows(source, split="train"):
    return [row for _, row in source.rows(split)]


@pytest.fixture
def prompts(tmp_path):
    train = write_jsonl(tmp_path / "llm" / "train.jsonl", [answers(10 * i) for i in range(40)])
    test = write_jsonl(tmp_path / "llm" / "test.jsonl", [answers(10 * i + 5) for i in range(20)])
    return train, test


def test_personal_llm_users_prefer_what_their_rewards_prefer(prompts):
    source = PersonalLLMSource(*prompts, num_users=8, num_unseen_users=4, judges=3)
    responses = {row["prompt"]: [row[f"response_{i}"] for i in range(1, 9)] for row in map(answers, range(0, 400, 10))}
    train = rows(source)
    assert len(train) == 40 * 3
    for row in train:  # all reward models prefer the later response
        order = responses[row["prompt"]]
        assert order.index(row["chosen"]) > order.index(row["rejected"])


def test_personal_llm_users_who_weigh_differently_disagree(tmp_path):
    row = answers(0)
    for i in range(1, 9):
        row[f"response_{i}_beaver_7b"] = -1000.0 * i
    path = write_jsonl(tmp_path / "train.jsonl", [row] * 30)
    source = PersonalLLMSource(path, num_users=10, judges=10, num_unseen_users=0)
    beaver = {f"user-{i}": source.weights[i][MODELS.index("beaver_7b")] > 0.5 for i in range(10)}
    assert 0 < sum(beaver.values()) < 10
    order = [row[f"response_{i}"] for i in range(1, 9)]
    for pair in rows(source):
        assert (order.index(pair["chosen"]) < order.index(pair["rejected"])) == beaver[pair["user_id"]]


def test_personal_llm_has_users_whom_only_validation_meets(prompts):
    source = PersonalLLMSource(*prompts, num_users=8, num_unseen_users=4, judges=4)
    seen, held_out = ({row["user_id"] for row in rows(source, split)} for split in ("train", "validation"))
    assert seen <= {f"user-{i}" for i in range(8)}
    assert held_out - seen == {f"unseen-{i}" for i in range(4)}
    judgments = Counter(row["user_id"].partition("-")[0] for row in rows(source, "validation"))
    assert judgments == {"user": 20 * 4, "unseen": 20 * 2}
    assert np.allclose(source.weights.sum(1), 1)


def test_personal_llm_loads_from_the_hub_as_from_files(prompts, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {"num_users": 8, "judges": 3}
    here, there = PersonalLLMSource(*prompts, **settings), PersonalLLMSource(hub=str(tmp_path / "llm"), **settings)
    for split in ("train", "validation"):
        assert rows(there, split) == rows(here, split)


def test_personal_llm_counts_answers_that_are_alike(tmp_path):
    row = answers(0) | {f"response_{i}": "same" for i in range(1, 9)}
    source = PersonalLLMSource(write_jsonl(tmp_path / "train.jsonl", [row]), num_users=2, judges=2)
    assert rows(source) == []
    assert source.counts("train") == {"left out (equal answers)": 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"response_3": None}, "field 'response_3' is null where"),
        ({"response_3_gemma_2b": "x"}, "field 'response_3_gemma_2b' is a string that is no number"),
        ({"response_3_gemma_2b": float("nan")}, "field 'response_3_gemma_2b' is nan, which is no judgment"),
    ],
)
def test_a_malformed_row_of_personal_llm_is_named(tmp_path, changes, says):
    path = write_jsonl(tmp_path / "train.jsonl", [answers(0), answers(1) | changes])
    with pytest.raises(FeedbackFormatError, match=rf"train\.jsonl:2: {says}"):
        rows(PersonalLLMSource(path, num_users=2, judges=1))


# ---- UltraFeedback-P


def test_ultrafeedback_p_users_are_the_four_attributes(tmp_path):
    source = UltraFeedbackPSource(write_ultrafeedback_p(tmp_path, rows=3))
    users = ["helpfulness", "honesty", "instruction_following", "truthfulness"]
    for split in ("train", "validation"):
        assert Counter(row["user_id"] for row in rows(source, split)) == dict.fromkeys(users, 3)
    assert rows(source)[0] == {"user_id": "helpfulness", "prompt": "a a a", "chosen": "a a a a",
                               "rejected": "the a a a"}  # fmt: skip


def test_ultrafeedback_p_can_be_two_users_where_they_disagree(tmp_path):
    source = UltraFeedbackPSource(write_ultrafeedback_p(tmp_path), ["helpfulness", "honesty"], controversial_only=True)
    assert Counter(row["user_id"] for row in rows(source)) == {"helpfulness": 2, "honesty": 2}
    assert source.counts("train") == {"left out (all users agree)": 2}


def test_a_malformed_row_of_ultrafeedback_p_is_named(tmp_path):
    folder = write_ultrafeedback_p(tmp_path)
    write_jsonl(folder / "4" / "train.jsonl", [{"prompt": "p", "chosen": "Human: p\n\nAssistant: c", "rejected": "c"}])
    with pytest.raises(FeedbackFormatError, match=r"4/train\.jsonl:1: field 'rejected' does not begin with 'Human: '"):
        rows(UltraFeedbackPSource(folder))


# ---- HH-RLHF


def test_hh_pseudo_users_are_helpful_and_harmless(tmp_path):
    source = HHRLHFSource(write_hh(tmp_path))
    assert Counter(row["user_id"] for row in rows(source)) == {"helpful": 3, "harmless": 3}
    row = rows(source)[0]
    assert row["prompt"] == "\n\nHuman: a a a\n\nAssistant: the a a\n\nHuman: cat a a\n\nAssistant:"
    assert row["chosen"] == " dog a a a"
    assert rows(source, "validation") == rows(source)


def test_hh_dialogues_can_be_messages(tmp_path):
    row = rows(HHRLHFSource(write_hh(tmp_path), conversations=True))[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][1]["content"] == "the a a"
    assert row["chosen"] == [{"role": "assistant", "content": "dog a a a"}]


def test_hh_loads_from_the_hub_as_from_files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_hh(tmp_path / "hh")
    here, there = HHRLHFSource(folder), HHRLHFSource(hub=str(folder))
    for split in ("train", "validation"):
        assert rows(there, split) == rows(here, split)
    assert next(there.rows("train"))[0] == f"{folder}/helpful-base/train*[train]:1"


def test_hh_counts_what_is_left_out(tmp_path):
    folder = write_hh(tmp_path)
    good, other = transcripts(0), transcripts(1)
    empty = {**good, "rejected": good["rejected"].rpartition("Assistant:")[0] + "Assistant: "}
    asking = good | {"rejected": good["rejected"] + "\n\nHuman: And?"}
    bad = [good | {"rejected": other["rejected"]}, good | {"rejected": good["chosen"]}, empty, asking]
    write_jsonl(folder / "helpful-base" / "train.jsonl.gz", [good, *bad])
    source = HHRLHFSource(folder, users={"helpful": ["helpful-base"]})
    assert len(rows(source)) == 1
    assert set(source.counts("train").items()) == {
        ("left out (the dialogues differ before the last reply)", 1),
        ("left out (equal replies)", 1),
        ("left out (empty replies)", 1),
        ("left out (no reply at the end)", 1),
    }


def test_hh_messages_that_differ_only_in_space_are_left_out(tmp_path):
    good = transcripts(0)
    folder = write_hh(tmp_path)
    write_jsonl(folder / "helpful-base" / "train.jsonl.gz", [good | {"rejected": good["chosen"] + " "}])
    assert [len(rows(HHRLHFSource(folder, conversations=c))) for c in (False, True)] == [4, 3]


def test_a_text_that_is_no_transcript_is_named(tmp_path):
    folder = write_hh(tmp_path)
    write_jsonl(folder / "harmless-base" / "train.jsonl.gz", [transcripts(0) | {"rejected": "Human: hi"}])
    with pytest.raises(FeedbackFormatError, match=r"train\.jsonl\.gz:1: field 'rejected' is no transcript from"):
        rows(HHRLHFSource(folder))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PersonalLLMSource(num_users=2, judges=3), "judges=3"),
        (lambda: PersonalLLMSource(validation="x.jsonl"), "so train must be one too"),
        (lambda: PersonalLLMSource("x.jsonl", alpha=1e-4).weights, "alpha=0.0001 is too small"),
        (lambda: UltraFeedbackPSource("x", ["kindness"]), "no user 'kindness'; there are helpfulness"),
        (lambda: UltraFeedbackPSource("x", []), "users is empty"),
        (lambda: HHRLHFSource("x", users={"helpful": []}), "give each user's folders"),
    ],
)
def test_impossible_settings_are_refused(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_hh_loads_whatever_configurations_its_card_names(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_hh(tmp_path / "hh")
    write_hub_card(folder, {"all": {"train": "*/train*", "test": "*/test*"}})
    assert Counter(row["user_id"] for row in rows(HHRLHFSource(hub=str(folder)))) == {"helpful": 3, "harmless": 3}
