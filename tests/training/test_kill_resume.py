"""A run that is killed goes on to the same weights."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and kill -9")
def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(repo_root):
    """The second kill comes while a checkpoint is being written."""
    script = [sys.executable, repo_root / "benchmarks/kill_resume.py", "--kills", "2", "--steps", "12"]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("2 kills in ")
    assert done.stdout.splitlines()[-1].endswith(" 0 differently; largest difference 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["accumulated", "bco"], ["validated_in_accumulation", "plain"], ["streamed", "bucketed"]], ids=str
)
def test_a_run_that_is_broken_off_anywhere_ends_as_one_in_peace(repo_root, tmp_path, monkeypatch, names):
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    mistakes = importlib.import_module("resume_points").measure(names, points=2, seed=0, root=tmp_path)
    assert list(mistakes) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and kill -9")
@pytest.mark.parametrize("name", ["accumulated", "online"])
def test_a_run_killed_twice_at_chosen_moments_leaves_the_same(repo_root, name):
    """Curve, best checkpoints and the tables of users included."""
    script = [sys.executable, repo_root / "benchmarks/kill_points.py", "--only", name]
    script += ["--singles", "1", "--pairs", "1"]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 ended differently" in done.stdout
