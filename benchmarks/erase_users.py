"""Time and memory of `users remove` for many users at once, and what a kill in the middle of it leaves.

    python benchmarks/erase_users.py                # 2,000 of 100,000 users, a checkpoint of 290 MB
    python benchmarks/erase_users.py --kills 20     # and 20 times kill -9 at a random moment, then the same command

Makes a run: a checkpoint with the optimizer's state, a second version of the run with the same users, and 100 MB of
predictions. Then it erases users by a file of ids, in a process of its own, and checks the result by the bytes of the
file. No model is needed, so none is made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from reporting import about, tell

from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import FORMAT, KEY, users_of

TABLE = "user_model.table.weight"
COMMAND = [sys.executable, "-m", "prlhf_lightning", "users", "remove"]


def make_run(folder: Path, users: list[str], width: int, predictions: int) -> Path:
    """Write a run with the users, and return its checkpoint.

    Args:
        folder: The run's folder.
        users: Their ids.
        width: Numbers in a user's row.
        predictions: Bytes of `predictions.jsonl`, about.
    """
    torch.manual_seed(0)
    rows = len(users) + 1
    table, mean, square = (torch.randn(rows, width) for _ in range(3))
    state = {"exp_avg": mean, "exp_avg_sq": square, "row_steps": torch.ones(rows)}
    content = {
        "state_dict": {TABLE: table},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"name": "user_tables", "params": [0]}]}],
        KEY: {"format": FORMAT, "users": users, "new_rows": {TABLE: table[0].clone()}, "shares": []},
    }
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint_files.save(content, path)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    draw = random.Random(0)
    answer = "The cat sat, and the dog ran to the red sun. " * 4
    with (folder / "predictions.jsonl").open("w") as file:
        for _ in range(predictions // 260):
            file.write(json.dumps({"user_id": draw.choice(users), "prompt": "a dog", "answer": answer}) + "\n")
    return path


def erase(model: Path, ids: Path, *options: str) -> tuple[float, float, float, int]:
    """Run the command; return its seconds, those of them on the CPU, its peak memory in MB, and its exit status."""
    start = time.perf_counter()
    child = subprocess.Popen([*COMMAND, "--model", str(model), "--user_file", str(ids), *options], stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    on_cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, on_cpu, usage.ru_maxrss / 1e3, child.returncode


def kill_and_go_on(model: Path, ids: Path, seconds: float, before: set[str], gone: set[str]) -> str:
    """Kill the command once, check the file, give the command again; return what the kill had left: old or new."""
    copy = model.with_name("copy.ckpt")
    shutil.copy(model, copy)
    command = [*COMMAND, "--model", str(copy), "--user_file", str(ids), "--skip_unknown", "true"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    left = set(users_of(checkpoint_files.load(copy, mmap=True)).ids)
    if left not in (before, before - gone):
        raise SystemExit(f"killed after {seconds:.2f} s: {len(left)} users are left, neither all nor those who stay")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if set(users_of(checkpoint_files.load(copy, mmap=True)).ids) != before - gone:
        raise SystemExit(f"killed after {seconds:.2f} s and given again: not all are erased")
    return "old" if left == before else "new"


def main() -> None:
    """Make the run, erase, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--remove", nargs="+", type=int, default=[1, 200, 2_000])
    parser.add_argument("--width", type=int, default=240, help="numbers in a user's row; three such rows are kept")
    parser.add_argument("--predictions", type=int, default=100_000_000, help="bytes")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    users = [f"user-{number}@example.org" for number in range(args.users)]
    draw = random.Random(0)
    lines = ["| users erased | seconds | of them on the CPU | peak memory, MB |", "|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        model = make_run(Path(folder, "version_0"), users, args.width, args.predictions)
        shutil.copytree(model.parent, Path(folder, "version_1", "checkpoints"))
        size = model.stat().st_size
        ids, output = Path(folder, "given", "ids.txt"), Path(folder, "erased.ckpt")
        ids.parent.mkdir()  # a folder that is not searched
        for count in args.remove:
            gone = draw.sample(users, count)
            ids.write_text("\n".join(gone))
            seconds, on_cpu, memory, status = erase(model, ids, "--output", str(output))
            raw = output.read_bytes()
            names = set(gone).intersection(users_of(checkpoint_files.load(output, mmap=True)).ids)
            if status or names or any(f"{user_id}".encode() in raw for user_id in gone[:50]):
                raise SystemExit(f"status {status}, {len(names)} of {count} users are still there")
            output.unlink()
            lines.append(f"| {count:,} of {args.users:,} | {seconds:.1f} | {on_cpu:.1f} | {memory:,.0f} |")
        lines = [
            f"{about()}; checkpoint {size / 1e6:,.0f} MB, predictions {args.predictions / 1e6:,.0f} MB",
            "",
            *lines,
        ]
        if args.kills:
            left = [
                kill_and_go_on(model, ids, draw.uniform(0, seconds), set(users), set(gone)) for _ in range(args.kills)
            ]
            counts = " and ".join(f"{left.count(kind)} the {kind} file" for kind in ("old", "new"))
            lines += ["", f"{args.kills} kills left {counts}; the same command, given again, then finished."]
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
