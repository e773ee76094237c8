"""Kills training at random steps and moments (kill -9), goes on with the same command, and compares the final weights.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py            # 20 kills
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 2 --steps 12
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --processes 2     # two that share the policy (FSDP2)

One run is left in peace. Then runs in folders of their own are killed, twice each where the second kill comes in time;
every other kill waits until a checkpoint is being written. Each is gone on with by the very same command, whose
`--ckpt_path last` finds the newest intact checkpoint, or begins anew where there is none yet. What they end with
(weights, optimizer, schedule) must be that of the run in peace, bit for bit. A process that is killed is a fork of this
one, which has imported all that takes long; it runs the command line. Of several processes one is killed, any of them,
and it is told where another does not then end by itself; weights must be equal to a tolerance, and how far apart they
are is told.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning.cli.main import main
from prlhf_lightning.training import checkpoint_files

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
    "--model.policy.lora.dropout=0.1",  # the random state must be resumed as well
    "--model.loss=DPOLoss",
    "--model.optim={lr: 0.002, user_lr: 0.03}",
    "--data.source=SimulatedSource",
    "--data.source.num_users=8",
    "--data.source.validation_pairs_per_user=2",
    "--data.source.num_unseen_users=1",
    "--data.batch_size=4",
    "--ckpt_path=last",
]


TOLERANCE = 1e-5
PATIENCE = 60  # seconds after which a process whose peer was killed is killed too, as torchrun and SLURM would


def start(folder: Path, steps: int, processes: int) -> list[int]:
    """Start the command in processes of its own, which write to `folder` alone; return their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_start(folder, steps, rank, processes, port) for rank in range(processes)]


def _start(folder: Path, steps: int, rank: int, processes: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        sharded = []
        if processes > 1:  # what torchrun tells a process
            strategy = "{class_path: prlhf_lightning.FSDP2Strategy}"
            sharded = [f"--trainer.strategy={strategy}", f"--trainer.devices={processes}"]
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            told |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
            os.environ.update({name: str(value) for name, value in told.items()})
        os.environ["PRLHF_CACHE"] = str(folder / "cache")
        log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # of each of 8 users, in batches of 4, twice
        pairs = f"--data.source.pairs_per_user={steps * processes // 4}"
        main([*COMMAND, *sharded, pairs, f"--trainer.default_root_dir={folder / 'runs'}"])
        os._exit(0)
    except BaseException as error:
        print("ended with", repr(error), flush=True)
        os._exit(1)


def killed(pids: list[int], victim: int, step: int, delay: float, folder: Path, writing: bool) -> bool:
    """Kill one process some time after a checkpoint of a step; return whether it was still at work.

    Not after a time alone: on a busy machine, most kills would come before there is any checkpoint.
    """
    pid = pids[victim]
    before = partials(folder)
    while reached(folder) < step and is_alive(pid):
        time.sleep(0.02)
    time.sleep(delay)
    while writing and not partials(folder) - before and is_alive(pid):
        time.sleep(0.0003)
    os.kill(pid, signal.SIGKILL)
    was_alive = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    deadline = time.time() + PATIENCE
    for rank, other in enumerate(pids):
        if other == pid:
            continue
        while is_alive(other) and time.time() < deadline:
            time.sleep(0.05)
        if is_alive(other):
            said = (folder / f"log-{rank}.txt").read_text()[-500:]
            print(f"process {rank}, whose peer was killed, still waits after {PATIENCE} s. It said last: {said}")
            os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    return was_alive


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


def finished(pids: list[int], folder: Path) -> None:
    """Wait for processes that must succeed."""
    for rank, pid in enumerate(pids):
        if os.waitpid(pid, 0)[1] != 0:
            sys.exit((folder / f"log-{rank}.txt").read_text()[-3000:])


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


def distance(a: Any, b: Any) -> float:
    """Return the largest difference between the tensors of two nested values, infinite where anything else differs."""
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf
        return 0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().nan_to_num(nan=math.inf).max())
    if isinstance(a, dict) and a.keys() == b.keys():
        return max((distance(value, b[key]) for key, value in a.items()), default=0.0)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return max(map(distance, a, b), default=0.0)
    return 0.0 if a == b else math.inf


def measure(kills: int, steps: int, processes: int, seed: int, root: Path) -> int:
    """Run it all; return how many runs ended otherwise than the one in peace."""
    draw = random.Random(seed)
    start_time = time.time()
    finished(start(root / "peace", steps, processes), root / "peace")
    length = time.time() - start_time
    expected = result(root / "peace", steps)
    print(f"in peace: {steps} steps, {length:.1f} s", flush=True)
    done, runs, wrong, torn, furthest = 0, 0, 0, 0, 0.0
    while done < kills:
        folder = root / f"run-{runs}"
        at: list[int] = []
        for _ in range(min(2, kills - done)):
            step, delay = draw.randrange(min(reached(folder), steps - 1), steps), draw.uniform(0.0, length / steps * 2)
            pids = start(folder, steps, processes)
            if not killed(pids, draw.randrange(processes), step, delay, folder, writing=bool(done % 2)):
                break
            done += 1
            at.append(reached(folder))
        torn += len(partials(folder))
        finished(start(folder, steps, processes), folder)
        apart = distance(result(folder, steps), expected)
        is_wrong = apart > (TOLERANCE if processes > 1 else 0.0)
        runs, wrong, furthest = runs + 1, wrong + is_wrong, max(furthest, apart)
        verdict = "DIFFERENT" if is_wrong else f"equal (apart by {apart:g})" if apart else "identical"
        print(f"run {runs}: killed with checkpoints of steps {at}; then {verdict}", flush=True)
    print(
        f"{done} kills in {runs} runs of {processes} (torn writes: {torn}): {runs - wrong} ended as the one in peace, "
        f"{wrong} differently; largest difference {furthest:g}"
    )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=32, help="of a run; a multiple of 4")
    parser.add_argument("--processes", type=int, default=1, help="of a run; more than one share the policy (FSDP2)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(measure(arguments.kills, arguments.steps, arguments.processes, arguments.seed, Path(folder)) > 0)
