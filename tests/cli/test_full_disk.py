"""What a full disk leaves: whole files and folders, as before, and one line that says which and why."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted_runs import fit
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from quiet_trainer import quiet_trainer

from prlhf_lightning.errors import CheckpointWriteError
from prlhf_lightning.policies import Sampling
from prlhf_lightning.training.callbacks.outputs import PredictionWriter
from prlhf_lightning.training.loggers import with_run_folder
from prlhf_lightning.utils.io import append_whole, atomic_write_bytes, naming, whole_folder, write_together

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full:
    """Stands for a function of `os`, and refuses its n-th call, or all calls from it on."""

    def __init__(self, function, at: int, always: bool = False) -> None:
        self.function, self.at, self.always, self.calls = function, at, always, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            raise NO_SPACE
        return self.function(*args)


@pytest.fixture
def half_written(monkeypatch):
    """The system takes half of what is written, and then refuses the rest."""
    write, calls = os.write, []

    def refuse(handle, data):
        calls.append(data)
        if len(calls) % 2 == 0:
            raise NO_SPACE
        return write(handle, bytes(data)[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        yield patch


def test_an_append_is_whole_or_does_not_happen(tmp_path, half_written):
    (tmp_path / "a.jsonl").write_text("1\n")
    with pytest.raises(
        CheckpointWriteError, match=r"a.jsonl could not be written: No space left.*unchanged. Free space"
    ):
        append_whole(tmp_path / "a.jsonl", b"22222\n")
    with pytest.raises(CheckpointWriteError, match=r"b.jsonl could not be written: No space left"):
        append_whole(tmp_path / "b.jsonl", b"22222\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.jsonl": "1\n"}
    half_written.undo()
    append_whole(tmp_path / "a.jsonl", b"3\n")
    assert (tmp_path / "a.jsonl").read_text() == "1\n3\n"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2])
def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch, function, at):
    (tmp_path / "page.html").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, Full(getattr(os, function), at))
        with pytest.raises(CheckpointWriteError, match=r"(page.html|page.json) could not be written: No space left"):
            write_together({tmp_path / "page.html": b"new", tmp_path / "page.json": b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "old"}


def write_folder(folder: Path, content: bytes, names: str) -> None:
    with whole_folder(folder, ["b*", "last"], last="last") as place:
        for name in names:
            atomic_write_bytes(place / name, content)
        (place / "sub").mkdir()
        atomic_write_bytes(place / "sub" / "c", content)
        atomic_write_bytes(place / "last", content)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_folder_is_replaced_whole_whichever_call_fails(tmp_path, monkeypatch, function, is_new):
    folder = tmp_path / "made" / "folder"
    if not is_new:
        write_folder(folder, b"1", "ab")
        (folder / "mine").write_text("1")
    before, said = contents(tmp_path), []
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, Full(getattr(os, function), len(said) + 1))
            try:
                write_folder(folder, b"2", "a")
                break
            except CheckpointWriteError as error:
                said.append(str(error))
        assert contents(tmp_path) == before
        assert folder.parent.exists() != is_new
    assert said
    assert all("No space left on device. " in one and ".partial could" not in one for one in said)
    after = {"a": "2", "sub/c": "2", "last": "2", **({} if is_new else {"mine": "1"})}
    assert contents(folder) == after
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_errors_that_only_quote_the_system_are_understood(tmp_path):
    says = "model could not be written: No space left on device"
    with pytest.raises(CheckpointWriteError, match=says), naming(tmp_path / "model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_metrics_table_has_whole_rows_and_goes_on_with_room(tmp_path, half_written):
    half_written.undo()
    (logger,), _ = with_run_folder(None, str(tmp_path))
    path = Path(logger.log_dir) / "metrics.csv"
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    for number, new in enumerate(["a", "b"], start=1):
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", Full(os.write, 1, always=True))
            patch.setattr(os, "fsync", Full(os.fsync, 1, always=True))
            logger.log_metrics({new: 2.0}, number)
            with pytest.raises(CheckpointWriteError, match=r"metrics.csv could not be written: No space left"):
                logger.save()
            logger.finalize("failed")  # does not take the place of the first error
        assert path.read_bytes() == before
        logger.save()
    rows = list(csv.DictReader(path.open()))
    assert rows == [
        {"a": "1.0", "b": "", "step": "0"}, {"a": "2.0", "b": "", "step": "1"}, {"a": "", "b": "2.0", "step": "2"},
    ]  # fmt: skip
    assert [one.name for one in path.parent.iterdir()] == ["metrics.csv"]


def test_given_loggers_stay_the_same_and_name_a_failed_write(tmp_path, monkeypatch):
    given = [CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="a")]
    assert with_run_folder(given, "runs")[0] == given
    given[1].log_metrics({"a": 1.0}, 0)
    monkeypatch.setattr(given[1].experiment, "flush", Full(None, 1))
    with pytest.raises(CheckpointWriteError, match=r"a/version_0 could not be written: No space left"):
        given[1].save()
    assert {path.name.partition(".")[0] for path in Path(given[1].log_dir).iterdir()} == {"events", "hparams"}


def test_predictions_get_their_name_when_all_are_there(model_path, votes, tmp_path, monkeypatch):
    module = fit(model_path, votes, tmp_path, max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    data = module.trainer.datamodule
    module.sampling = Sampling(max_new_tokens=2)
    atomic_write_bytes(tmp_path / "predictions.jsonl", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Full(os.write, 2))
        with (
            pytest.warns(UserWarning, match=r"The 4 answers written so far are in .*predictions.partial.jsonl"),
            pytest.raises(CheckpointWriteError, match=r"partial.jsonl could not be written: No space left"),
        ):
            quiet_trainer(tmp_path, callbacks=[PredictionWriter()]).predict(module, data)
    assert (tmp_path / "predictions.jsonl").read_text() == "old"
    assert len([json.loads(line) for line in (tmp_path / "predictions.partial.jsonl").read_text().splitlines()]) == 4
    quiet_trainer(tmp_path, callbacks=[PredictionWriter()]).predict(module, data)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) > 4
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
def test_output_that_cannot_be_printed_is_an_error_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "prlhf_lightning", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "error: A file, or the output, could not be written: No space left on device.\n",
    )  # fmt: skip


def test_commands_on_a_full_disk_lose_nothing_and_leave_no_part(repo_root):
    words = ["--only", "api-key", "data convert", "--points", "3", "--ways", "call"]
    command = [sys.executable, str(repo_root / "benchmarks/full_disk.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 0 | 0 |") == 2
