"""Trouble in one of two processes ends both, and neither waits for the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_votes
from short_runs import run_config, write_config

from prlhf_lightning.losses import DPOLoss

pytestmark = pytest.mark.slow

SECONDS = 150  # a process that waits for the other does so for half an hour


class Trouble(DPOLoss):
    """Gets into trouble in the third batch of one process.

    Args:
        beta: See `DPOLoss`.
        kind: What happens.
        rank: Which process it happens to.
    """

    def __init__(self, beta: float = 0.1, kind: str = "nan", rank: int = 1) -> None:
        super().__init__(beta)
        self.kind, self.rank, self.calls = kind, rank, 0

    def pair_loss(self, policy, reference):
        losses = super().pair_loss(policy, reference)
        self.calls += self.training
        if self.training and self.calls == 5 and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            if self.kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.kind == "memory":
                torch.empty(2**60)
        is_bad = self.kind == "nan" and self.calls > 4 and int(os.environ.get("LOCAL_RANK", "0")) == self.rank
        return losses * float("nan") if is_bad and self.training else losses


def run(folder: Path, model_path: str, kind: str, rank: int) -> tuple[int, str]:
    """Train in two processes until the trouble; return the code that the command ends with, and what it says."""
    votes = write_votes(folder / "votes.jsonl", {"ann": 20, "bob": 20})
    content = run_config(
        folder,
        {"model": model_path, "lora": {"rank": 2}},
        votes,
        trainer={"devices": 2, "strategy": "ddp"},
        model={"loss": {"class_path": "test_two_processes.Trouble", "init_args": {"kind": kind, "rank": rank}}},
        data={"batch_size": 2},
    )
    config = write_config(folder, content)
    here = Path(__file__)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "PL_GLOBAL_SEED")},
        "PYTHONPATH": os.pathsep.join(map(str, [here.parent, here.parents[2], here.parents[3]])),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "prlhf_lightning", "fit", "-c", str(config)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(SECONDS)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # the other process, too, must have ended by itself
                others = True
            except ProcessLookupError:
                others = False
            process.wait()
    text = (folder / "output.txt").read_text()
    assert not others or code, text[-3000:]
    return code, text


def test_a_non_finite_loss_in_one_process_stops_both_at_once(model_path, tmp_path):
    code, text = run(tmp_path, model_path, "nan", rank=1)
    assert code == 1, text[-3000:]
    assert "Traceback" not in text
    errors = {line for line in text.splitlines() if line.startswith("error: ")}
    (error,) = errors  # both say the same, for the one that is looked at may have had no part in it
    assert "NaN after step 2, from" in error
    assert "votes.jsonl:" in error
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/interrupted.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_step(model_path, tmp_path, rank):
    code, text = run(tmp_path, model_path, "signal", rank)
    assert code == 128 + signal.SIGTERM, text[-3000:]
    assert "Traceback" not in text
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/interrupted.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_in_one_process_leaves_none_waiting(model_path, tmp_path, rank):
    code, text = run(tmp_path, model_path, "memory", rank)
    assert code != 0
    assert "error: Memory ran out in training, in or after a batch of 2 pairs" in text
