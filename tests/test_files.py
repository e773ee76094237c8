"""A file takes its name when all of it is on the disk, and not before."""

from __future__ import annotations

import os

import pytest

from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.errors import CheckpointWriteError, FeedbackFormatError
from prlhf_lightning.files import as_text, atomically, replacing


def test_text_is_written_as_it_is_in_a_folder_that_is_made(tmp_path):
    with replacing(tmp_path / "new" / "a.csv") as file, as_text(file) as text:
        text.write("né\r\n")
    assert (tmp_path / "new" / "a.csv").read_bytes() == "né\r\n".encode()


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomically(path) as file, as_text(file) as text:
        text.write(str(1 / 0))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_who_may_read_a_file_stays_as_it_was(tmp_path):
    (path := tmp_path / "a.csv").touch(0o600)
    with replacing(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


def test_of_several_writers_at_once_the_last_counts(tmp_path):
    path = tmp_path / "a.csv"
    with atomically(path, shared=True) as last:
        with atomically(path, shared=True) as first:
            first.write(b"first")
        assert path.read_bytes() == b"first"
        last.write(b"last")
    assert path.read_bytes() == b"last"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_the_error_names_the_file_and_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    says = r"file/a.csv could not be written: File exists. Nothing is left of it. Make room, or choose another"
    with pytest.raises(CheckpointWriteError, match=says), replacing(tmp_path / "file" / "a.csv"):
        pass


def test_what_is_wrong_with_a_file_that_is_read_meanwhile_is_not_blamed_on_the_one_that_is_written(tmp_path):
    (damaged := tmp_path / "votes.jsonl.gz").write_bytes(b"no gzip data")
    with pytest.raises(FeedbackFormatError, match="gzip data is damaged"), replacing(tmp_path / "a.csv"):
        list(read_rows(damaged))
    assert os.listdir(tmp_path) == ["votes.jsonl.gz"]
