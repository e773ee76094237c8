import os

import pytest
from feedback_helpers import row, write_jsonl

from prlhf_lightning.data import FileSource
from prlhf_lightning.data.holdout import UserCounts, count, count_users, read_user_counts
from prlhf_lightning.errors import FeedbackFormatError

ROWS = [row(0, "ann"), row(1, 'b,"ob', user_text="likes w1"), row(2, "ann")]


def test_it_counts_the_rows_of_each_user_and_the_texts(tmp_path):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert count(source, "train") == UserCounts({"ann": 2, 'b,"ob': 1}, texts=1)


def test_a_count_is_kept_until_the_data_change(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    first = count_users(FileSource(path), "train", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "rows", None)
        assert count_users(FileSource(path), "train", tmp_path) == first
    write_jsonl(path, [*ROWS, row(3, "cy")])
    assert count_users(FileSource(path), "train", tmp_path).rows["cy"] == 1


def test_a_row_without_a_user_is_named(tmp_path):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", [row(0), row(1, user_id=7.5)]))
    with pytest.raises(FeedbackFormatError, match=r"a.jsonl:2: field 'user_id' is of type float"):
        count(source, "train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user_id,rows\nann,2\nann,1\n", "users.csv:3: this user stands in the file twice"),
        ("user_id,rows\nann,none\n", "users.csv:2: field 'rows' is 'none'; write a whole number, at least 1"),
        ("user_id\nann\n", "field 'rows' is None"),
        ("user_id,rows,texts\nann,1,-1\n", "field 'texts' is '-1'"),
    ],
)
def test_a_bad_file_of_users_is_refused(tmp_path, text, says):
    (tmp_path / "users.csv").write_text(text)
    with pytest.raises(FeedbackFormatError, match=says):
        read_user_counts(tmp_path / "users.csv")


def test_where_texts_are_not_counted_all_rows_may_have_one(tmp_path):
    (tmp_path / "users.csv").write_text("user_id,rows\nann,2\nbob,3\n")
    assert read_user_counts(tmp_path / "users.csv") == UserCounts({"ann": 2, "bob": 3}, texts=5)


def test_a_count_is_on_disk_before_its_name_and_leaves_no_parts(tmp_path, monkeypatch, caplog):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", ROWS))
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "replace", lambda *_: (tmp_path / "cache").rmdir())  # fails: what was written is in it
    assert count_users(source, "train", tmp_path / "cache") == count(source, "train")
    assert "the count of users cannot be written" in caplog.text
    assert len(flushed) == 1
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".sha256"])
def test_a_count_that_is_damaged_is_made_again_with_a_word(tmp_path, caplog, suffix):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", ROWS))
    whole = count_users(source, "train", tmp_path)
    (path,) = tmp_path.glob(f"users-*{suffix}")
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert count_users(source, "train", tmp_path) == whole
    assert caplog.text.count("is damaged. They are counted again.") == 1
    caplog.clear()
    assert count_users(source, "train", tmp_path) == whole
    assert not caplog.text
