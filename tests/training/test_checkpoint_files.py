"""Checkpoint files are whole or an error, and a write that fails leaves what was there."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from prlhf_lightning.errors import CheckpointWriteError, DamagedCheckpointError
from prlhf_lightning.training import checkpoint_files


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.ckpt"
    checkpoint_files.save({"weights": torch.arange(1000.0), "names": ["ann", "bob"]}, path)
    return path


@pytest.fixture(scope="module")
def fuzzing(repo_root):
    spec = importlib.util.spec_from_file_location("fuzz_checkpoint", repo_root / "benchmarks/fuzz_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sealed_file_opens_with_torch_alone(good):
    for mmap in (False, True):
        content = torch.load(good, weights_only=True, mmap=mmap)
        assert torch.equal(content["weights"], torch.arange(1000.0))
    assert zipfile.ZipFile(good).comment.startswith(b"prlhf_lightning sha256 ")
    assert zipfile.ZipFile(good).testzip() is None


def test_a_flipped_bit_that_torch_does_not_see_is_seen(good):
    raw = bytearray(good.read_bytes())
    raw[raw.find(torch.tensor([500.0, 501.0]).numpy().tobytes()) + 2] ^= 1
    good.write_bytes(raw)
    assert not torch.equal(torch.load(good, weights_only=True)["weights"], torch.arange(1000.0))
    with pytest.raises(DamagedCheckpointError, match=r"good.ckpt is damaged.*There is no intact one beside it"):
        checkpoint_files.load(good)


def test_a_file_of_plain_torch_is_loaded_and_checked(tmp_path):
    path = tmp_path / "plain.ckpt"
    torch.save({"weights": torch.arange(1000.0)}, path)
    assert torch.equal(checkpoint_files.load(path)["weights"], torch.arange(1000.0))
    raw = bytearray(path.read_bytes())
    raw[raw.find(torch.tensor([500.0, 501.0]).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedCheckpointError, match=r"the checksum of its part plain/data/0 is wrong"):
        checkpoint_files.load(path)


def test_a_seal_that_was_cut_off_does_not_make_a_plain_file(good):
    raw = good.read_bytes()
    good.write_bytes(raw[: raw.rfind(b"prlhf_lightning sha256 ")])
    assert torch.load(good, weights_only=True)  # torch would take it
    with pytest.raises(DamagedCheckpointError, match="its end is missing"):
        checkpoint_files.load(good)


def test_the_newest_intact_checkpoint_is_named(good, tmp_path):
    for age, name in enumerate(["old.ckpt", "older.ckpt"], start=1):
        checkpoint_files.save({}, tmp_path / name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "newer.ckpt").write_bytes(b"")
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    good.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"newest intact checkpoint beside it is .*/old.ckpt"):
        checkpoint_files.load(good)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(1_000_000), [torch.zeros(100) for _ in range(2000)]],
    ids=["within a tensor", "between tensors"],
)
def test_a_write_that_the_system_refuses_leaves_what_was_there(good, small_files, content):
    before = good.read_bytes()
    with pytest.raises(CheckpointWriteError, match=r"good.ckpt could not be written: .*The old version is unch"):
        checkpoint_files.save(content, good)
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == ["good.ckpt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_found_full_at_the_end_leaves_the_old_file(good, monkeypatch, function):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = good.read_bytes()
    monkeypatch.setattr(os, function, fails)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        checkpoint_files.save({}, good)
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == ["good.ckpt"]


def test_an_error_in_what_is_saved_is_not_taken_for_the_disk_s(good):
    before = good.read_bytes()
    with pytest.raises(AttributeError):
        checkpoint_files.save({"code": lambda: None}, good)
    assert good.read_bytes() == before


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(good, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    checkpoint_files.save({}, good)
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_link_goes_on_pointing_at_the_file(good, tmp_path):
    link = tmp_path / "link.ckpt"
    link.symlink_to(good)
    checkpoint_files.save({"new": True}, link)
    assert link.is_symlink()
    assert checkpoint_files.load(good) == {"new": True}


def test_no_damaged_file_loads_as_something_else_or_runs_code(fuzzing, tmp_path):
    fuzzing.example(tmp_path / "example.ckpt")
    outcomes = fuzzing.fuzz(tmp_path / "example.ckpt", 130, 1, tmp_path)
    assert {outcome for counts in outcomes.values() for outcome in counts} <= {"detected", "harmless"}
    assert sum(counts.total() for counts in outcomes.values()) > 120
    assert len(outcomes) == 12


def test_the_same_damage_is_silent_or_runs_code_in_plain_torch(fuzzing, tmp_path):
    """So that the test above would fail."""
    fuzzing.example(tmp_path / "example.ckpt")
    outcomes = fuzzing.fuzz(
        tmp_path / "example.ckpt", 130, 1, tmp_path, load=lambda path: torch.load(path, weights_only=False)
    )
    assert outcomes["flip_bits"]["silent"]
    assert outcomes["swap_members"]["silent"]
    assert outcomes["crafted"]["ran code"]


# In a process of its own: a fork of this one, whose libraries have threads, may hang.
KILLS = """
import os, signal, sys
from pathlib import Path
import torch
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.utils.io import partial_path

torch.set_num_threads(1)
path, content = Path(sys.argv[1]), {"weights": torch.ones(300_000)}
for _ in range(8):
    pid = os.fork()
    while not pid:
        checkpoint_files.save(content, path)
    while not partial_path(path).exists():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(checkpoint_files.load(path)["weights"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and kill -9")
def test_a_process_killed_while_writing_leaves_old_or_new_file(good):
    done = subprocess.run([sys.executable, "-c", KILLS, good], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    sizes = done.stdout.split()
    assert len(sizes) == 8
    assert set(sizes) <= {"1000", "300000"}
