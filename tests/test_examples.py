"""The examples run, made small."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def example(repo_root: Path, monkeypatch, tmp_path):
    """Return a function that imports an example."""
    monkeypatch.syspath_prepend(repo_root / "examples")
    monkeypatch.chdir(tmp_path)
    for name in ("plain_loop", "custom_loss", "new_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_the_plain_loop_lowers_the_loss(example, capsys):
    example("plain_loop").main(pairs_per_user=60)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert lines[-1].startswith("accuracy 0.")


def test_a_loss_of_ones_own_trains(example):
    assert example("custom_loss").main(pairs_per_user=20) > 0.4


def test_new_users_are_added_to_the_model(example):
    before, after = example("new_user").main(pairs_per_user=20)
    assert 0 <= before <= 1
    assert 0 <= after <= 1


@pytest.mark.parametrize("name", ["plain_loop", "custom_loss", "new_user"])
def test_an_example_is_short(name, repo_root):
    assert len((repo_root / "examples" / f"{name}.py").read_text().splitlines()) < 100
