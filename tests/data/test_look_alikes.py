"""Ids that look alike, rows that hold control tokens, and columns that nothing reads: all told, with counts."""

import unicodedata

import pytest
from feedback_helpers import row, word_tokenizer, write_jsonl

from prlhf_lightning.cli.data_check import described
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.users import look_alikes, stands_for_nobody
from prlhf_lightning.errors import FeedbackFormatError

COMPOSED = unicodedata.normalize("NFC", "José")


@pytest.mark.parametrize(
    "ids",
    [
        ["7", "7.0", "07", "7e0", "+7"],
        ["1000", "1e3", "1000.0"],
        ["ann", "Ann", " ann", "ann ", "ann\t"],
        ["ann lee", "ann  lee", "ann\u00a0lee"],
        [COMPOSED, unicodedata.normalize("NFD", COMPOSED)],
        ["ann", "a\u200bnn", "\ufeffann"],
        ["A1", "\uff21\uff11"],
        ["0", "-0", "0.0"],
    ],
)
def test_ids_of_one_person_in_other_spellings_look_alike(ids):
    assert look_alikes([*ids, "somebody else"]) == [ids]


@pytest.mark.parametrize("ids", [["7", "70", "7.5", "-7"], ["ann", "anna", "a-nn"], ["1e3", "1e30"], ["x7", "x07"]])
def test_ids_that_differ_do_not(ids):
    assert look_alikes(ids) == []


@pytest.mark.parametrize("user_id", ["null", "None", "nan", "NA", "N/A", "", "\u200b", " - "])
def test_ids_that_read_like_missing_values_are_known(user_id):
    assert stands_for_nobody(user_id)
    assert not stands_for_nobody("Nancy")


def kinds(path, **splits):
    report = Inspector(FileSource(path, **splits), min_votes=0)()
    return {group.kind: (group.count, str(group.examples[0])) for group in report.problems}, report


def test_check_reports_look_alike_ids_within_and_across_files(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [row(0, "7"), row(1, "7"), row(2, "null")])
    other = write_jsonl(tmp_path / "b.jsonl", [row(3, "7.0"), row(4, "bob "), row(5, "7")])
    found, report = kinds(train, validation=other)
    count, example = found["user ids that look alike"]
    assert count == 1
    assert "'7' (2 in train, 1 in validation) and '7.0' (1 in validation) look alike" in example
    assert found["user id that reads like a missing value"][0] == 1
    assert "'bob ' (1 in validation) has spaces" in found["user id with hidden characters"][1]
    assert any(group["kind"] == "user ids that look alike" for group in report.as_dict()["problems"])


def test_ids_of_pandas_are_told(tmp_path):
    found, _ = kinds(write_jsonl(tmp_path / "a.jsonl", [row(0, "7.0"), row(1, "8.0")]))
    assert "'7.0' (1 in train) and all other ids end in .0" in found["user ids that end in .0"][1]


def test_a_run_reports_look_alike_ids_and_unread_columns(tmp_path):
    rows = [row(number, user, stars=1) for number in range(20) for user in ("7", "07")]
    data = PreferenceDataModule(FileSource(write_jsonl(tmp_path / "a.jsonl", rows)), word_tokenizer())
    data.prepare_data()
    text = data.describe()
    assert "1 groups of user ids that look alike, of one person each? ('07' and '7')" in text
    assert "train: columns not read: 'stars'" in text


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"prompt": "<bos> w1"}, "prompt", "holds the control token '<bos>'"),
        ({"chosen": "one <eos>"}, "chosen", "holds the control token '<eos>'"),
        ({"rejected": "two<|im_end|>"}, "rejected", "holds the control token '<|im_end|>'"),
        (
            {"prompt": "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\n"},
            "prompt",
            "a chat template has rendered",
        ),
        ({"prompt": "[INST] w1 [/INST]"}, "prompt", "is a conversation that a chat"),
    ],
)
def test_control_tokens_in_rows_are_counted_by_check_and_run(tmp_path, caplog, changes, field, told):
    rows = [row(number, f"user {number % 3}", **(changes if number in (3, 5) else {})) for number in range(12)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    report = Inspector(FileSource(path), min_votes=0, tokenizer=word_tokenizer())()
    (group,) = [group for group in report.problems if told in group.examples[0].problem]
    first = group.examples[0]
    assert (group.count, first.line, first.field, group.severity) == (2, 4, field, "warning")
    PreferenceDataModule(FileSource(path), word_tokenizer()).prepare_data()
    messages = [record.getMessage() for record in caplog.records if told in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("2 of 12 train rows")
    assert f"(first: {path}:4)" in messages[0]


def test_an_empty_file_and_one_of_only_ties_get_one_line(tmp_path):
    (tmp_path / "empty.csv").write_text("user_id,prompt,chosen,rejected\n")
    report = Inspector(FileSource(tmp_path / "empty.csv"))()
    assert [group.kind for group in report.problems] == ["has no rows"]
    assert "reading stopped" not in described(report)
    ties = FileSource(write_jsonl(tmp_path / "ties.jsonl", [row(0, chosen="x", rejected="x")]))
    with pytest.raises(FeedbackFormatError, match="give rows of which one completion is preferred"):
        PreferenceDataModule(ties, word_tokenizer(), ties="drop").prepare_data()


def test_rows_without_control_tokens_are_not_told_of(tmp_path):
    rows = [row(0, chosen="<s>old</s> is struck out in HTML"), row(1, prompt="a < b and [INSTALL]")]
    found, _ = kinds(write_jsonl(tmp_path / "a.jsonl", rows))
    assert found == {}
