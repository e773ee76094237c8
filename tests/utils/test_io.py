"""A file takes its name when all of it is on the disk, and not before."""

from __future__ import annotations

import errno
import os

import pytest

from prlhf_lightning.cli.main import main
from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.errors import CheckpointWriteError, ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.io import atomic_file, atomic_writer, check_output, check_output_folder, text_writer


def test_text_is_written_as_it_is_in_a_folder_that_is_made(tmp_path):
    with atomic_writer(tmp_path / "new" / "a.csv") as file, text_writer(file) as text:
        text.write("né\r\n")
    assert (tmp_path / "new" / "a.csv").read_bytes() == "né\r\n".encode()


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file, text_writer(file) as text:
        text.write(str(1 / 0))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_new_file_is_its_owners_alone(tmp_path):
    with atomic_writer(tmp_path / "a.csv") as file:
        file.write(b"ann")
    assert (tmp_path / "a.csv").stat().st_mode & 0o777 == 0o600


def test_who_may_read_a_file_stays_as_it_was(tmp_path):
    (path := tmp_path / "a.csv").touch(0o600)
    with atomic_writer(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


def test_of_several_writers_at_once_the_last_counts(tmp_path):
    path = tmp_path / "a.csv"
    with atomic_file(path, shared=True) as last:
        with atomic_file(path, shared=True) as first:
            first.write(b"first")
        assert path.read_bytes() == b"first"
        last.write(b"last")
    assert path.read_bytes() == b"last"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    says = r"file/new/a.csv could not be written: \S+/file is a file, not a folder. Choose another folder."
    with pytest.raises(CheckpointWriteError, match=says), atomic_writer(tmp_path / "file" / "new" / "a.csv"):
        pass


@pytest.mark.parametrize(("path", "kind"), [("", "a folder"), (os.devnull, "a device")])
def test_what_is_no_file_is_not_replaced(tmp_path, path, kind):
    says = f"is {kind}.* not a regular file; give the name of a file"
    with pytest.raises(CheckpointWriteError, match=says), atomic_writer(tmp_path / path):
        pytest.fail("nothing should be computed")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "No space left on device. The partial file was removed. Free space, or choose another folder."),
        (errno.EDQUOT, "quota exceeded. .* Free space"),
        (errno.EFBIG, "File too large. .* Choose a folder that allows files of this size"),
        (errno.EACCES, r"no permission to write to the folder \S+ \(Permission denied\). .* Get permission"),
        (errno.EROFS, "Read-only file system. .* Choose a writable folder."),
        (errno.EIO, "Input/output error. .* Choose another folder."),
    ],
)
def test_the_error_names_the_file_and_what_to_do(tmp_path, monkeypatch, number, says):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    with (
        pytest.raises(CheckpointWriteError, match=f"a.csv could not be written: .*{says}"),
        atomic_writer(tmp_path / "a.csv"),
    ):
        pass
    assert not os.listdir(tmp_path)


def test_a_refused_write_is_told_whatever_a_library_raises(tmp_path, small_files):
    def write(file):
        try:
            file.write(bytes(2 << 20))
        except OSError:
            raise RuntimeError("write failed") from None

    with pytest.raises(CheckpointWriteError, match="File too large"), atomic_writer(tmp_path / "a.csv") as file:
        write(file)


def test_an_unreadable_input_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such input"), atomic_writer(tmp_path / "a.csv"):
        raise FileNotFoundError("no such input")
    with pytest.raises(OSError, match="the network") as told, atomic_writer(tmp_path / "a.csv"):
        raise OSError("the network is down")
    assert not isinstance(told.value, CheckpointWriteError)


def test_a_faulty_input_is_not_blamed_on_the_output(tmp_path):
    (damaged := tmp_path / "votes.jsonl.gz").write_bytes(b"no gzip data")
    with pytest.raises(FeedbackFormatError, match="gzip data is damaged"), atomic_writer(tmp_path / "a.csv"):
        list(read_rows(damaged))
    assert os.listdir(tmp_path) == ["votes.jsonl.gz"]


@pytest.mark.parametrize("name", ["file/a", "file/new/a", "/proc/xx", "/proc/xx/yy", "x" * 300, "/dev/null"])
@pytest.mark.parametrize("check", [check_output, check_output_folder])
def test_an_unwritable_output_is_told_before_any_computation(tmp_path, name, check):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"^output: \S+ (cannot be written|is a device|is a file)"):
        check(tmp_path / name, "output")


@pytest.mark.parametrize(
    "words",
    [
        ["export"],
        ["generate", "--prompt", "x"],
        ["relocate", "--base", "x"],
        ["users", "export"],
        ["users", "add", "--user", "x"],
        ["users", "remove", "--user", "x"],
    ],
)
def test_every_writing_command_checks_its_output_first(words):
    with pytest.raises(SystemExit, match=r"^error: output: /proc/xx cannot be written"):
        main([*words, "--model", "none.ckpt", "--output", "/proc/xx"])


@pytest.mark.parametrize("words", [["check"], ["convert"], ["describe"]])
def test_commands_on_data_check_where_to_write_before_they_read(words):
    with pytest.raises(SystemExit, match=r"^error: output: /proc/xx cannot be written"):
        main(["data", *words, "--train", "none.jsonl", "--output", "/proc/xx"])
