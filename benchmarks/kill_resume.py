"""Kills training at random steps and moments (kill -9), goes on with the same command, and compares the final weights.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py            # 20 kills
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 2 --steps 12

One run is left in peace. Then runs in folders of their own are killed, twice each where the second kill comes in time;
every other kill waits until a checkpoint is being written. Each is gone on with by the very same command, whose
`--ckpt_path last` finds the newest intact checkpoint, or begins anew where there is none yet. What they end with
(weights, optimiser, schedule) must be that of the run in peace, bit for bit. A process that is killed is a fork of this
one, which has imported all that takes long; it runs the command line.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning import checkpoint_files
from prlhf_lightning.cli import main

COMMAND = [
    "fit",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=2",
    "--model.user_model=IndividualUserModel",
    "--model.user_model.num_tokens=4",
    "--model.policy=CausalLMPolicy",
    "--model.policy.model=builtin:style-lm",
    "--model.policy.lora.dropout=0.1",  # chance must be gone on with as well
    "--model.loss=DPOLoss",
    "--model.optim={lr: 0.002, user_lr: 0.03}",
    "--data.source=SimulatedSource",
    "--data.source.num_users=8",
    "--data.source.validation_pairs_per_user=2",
    "--data.source.num_unseen_users=1",
    "--data.batch_size=4",
    "--ckpt_path=last",
]


def start(folder: Path, steps: int) -> int:
    """Start the command in a process of its own, which writes to `folder` alone; return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ["PRLHF_CACHE"] = str(folder / "cache")
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        pairs = f"--data.source.pairs_per_user={steps // 4}"  # of each of 8 users, in batches of 4, twice
        main([*COMMAND, pairs, f"--trainer.default_root_dir={folder / 'runs'}"])
        os._exit(0)
    except BaseException as error:
        print("ended with", repr(error), flush=True)
        os._exit(1)


def killed(pid: int, step: int, delay: float, folder: Path, writing: bool) -> bool:
    """Kill a process some time after a checkpoint of a step; return whether it was still at work.

    Not after a time alone: on a busy machine, most kills would come before there is any checkpoint.
    """
    before = partials(folder)
    while reached(folder) < step and is_alive(pid):
        time.sleep(0.02)
    time.sleep(delay)
    while writing and not partials(folder) - before and is_alive(pid):
        time.sleep(0.0003)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def is_alive(pid: int) -> bool:
    """Whether a child has not ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def reached(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    path = newest(folder)
    return int(checkpoint_files.load(path)["global_step"]) if path else 0


def partials(folder: Path) -> set[Path]:
    """Return the files of a run that were not written to their end."""
    return set(folder.glob("runs/*/checkpoints/.*.partial"))


def finished(pid: int, folder: Path) -> None:
    """Wait for a process that must succeed."""
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit((folder / "log.txt").read_text()[-3000:])


def newest(folder: Path) -> Path | None:
    """Return the checkpoint that was written last."""
    files = sorted(folder.glob("runs/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return files[-1] if files else None


def result(folder: Path, steps: int) -> dict[str, Any]:
    """Return what a run ended with."""
    path = newest(folder)
    assert path is not None
    content = checkpoint_files.load(path)
    assert content["global_step"] == steps, content["global_step"]
    return {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def measure(kills: int, steps: int, seed: int, root: Path) -> int:
    """Run it all; return how many runs ended otherwise than the one in peace."""
    draw = random.Random(seed)
    start_time = time.time()
    finished(start(root / "peace", steps), root / "peace")
    length = time.time() - start_time
    expected = result(root / "peace", steps)
    print(f"in peace: {steps} steps, {length:.1f} s", flush=True)
    done, runs, wrong, torn = 0, 0, 0, 0
    while done < kills:
        folder = root / f"run-{runs}"
        at: list[int] = []
        for _ in range(min(2, kills - done)):
            step, delay = draw.randrange(min(reached(folder), steps - 1), steps), draw.uniform(0.0, length / steps * 2)
            if not killed(start(folder, steps), step, delay, folder, writing=bool(done % 2)):
                break
            done += 1
            at.append(reached(folder))
        torn += len(partials(folder))
        finished(start(folder, steps), folder)
        is_same = same(result(folder, steps), expected)
        runs, wrong = runs + 1, wrong + (not is_same)
        verdict = "identical" if is_same else "DIFFERENT"
        print(f"run {runs}: killed with checkpoints of steps {at}; then {verdict}", flush=True)
    print(f"{done} kills in {runs} runs ({torn} in the middle of a write): {runs - wrong} identical, {wrong} different")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32, help="of a run; a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(measure(arguments.kills, arguments.steps, arguments.seed, Path(folder)) > 0)
