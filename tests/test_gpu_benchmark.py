"""The program that is run when there is a GPU, where there is none."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def run(repo_root, monkeypatch) -> Iterator[Callable[..., None]]:
    """Run the program with arguments."""
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import gpu

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
        gpu.main()

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)  # the program sets its own


def test_without_a_gpu_the_plan_is_told_and_nothing_is_written(run, tmp_path, capsys):
    run("--out", tmp_path / "out")
    told = capsys.readouterr().out
    for words in (
        "There is no GPU",
        "tests/test_gpu.py",
        "weights 16.5 GiB",
        "[skipped: --model and --data",
        "sharing",
    ):
        assert words in told
    assert not (tmp_path / "out").exists()


def test_a_rehearsed_part_leaves_results_table_and_summary(run, tmp_path, capsys):
    run("--out", tmp_path, "--rehearse", "--only", "sharing")
    about, *results = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert about["torch"] == torch.__version__
    assert len(results) == 10  # three ways with layers kept and two with layers recomputed, padded or not
    assert all(result["part"] == "sharing" and result["ms"] > 0 for result in results)
    report = (tmp_path / "report.md").read_text()
    assert all(result["what"] in report for result in results)
    assert "- sharing: ran in " in report


def test_a_part_over_its_limit_is_stopped_and_said_to_be(run, tmp_path):
    with pytest.raises(SystemExit, match="1"):
        run("--out", tmp_path, "--rehearse", "--only", "sharing", "--limit", 1)
    assert "- sharing: stopped at its limit of 1 s" in (tmp_path / "report.md").read_text()
