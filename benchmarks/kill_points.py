"""Kills training (kill -9) at chosen moments, once and twice, and compares all that is left with a run in peace.

    OMP_NUM_THREADS=1 python benchmarks/kill_points.py                        # 18 configurations
    OMP_NUM_THREADS=1 python benchmarks/kill_points.py --only plain --pairs 0 --singles 4
    OMP_NUM_THREADS=1 python benchmarks/kill_points.py --way terminate        # SIGTERM in place of kill -9; max_time
    OMP_NUM_THREADS=1 python benchmarks/kill_points.py --together 10          # runs that are started at once

A moment is a place in the code, such as a micro-batch inside an accumulation, a token of an answer of online RL, a
batch of a validation, a half-written checkpoint, or between the best and the last; and which time it is reached. A
process that reaches it kills itself. It is started again by the same command (`--ckpt_path last`) until it ends by
itself. What its newest folder then holds must be that of the run in peace, bit for bit: weights, optimizer, schedule,
number of steps; names, scores and weights of the best checkpoints; every row of `metrics.csv` (but for speed and
memory), and `users_seen.csv`.

Processes are forks of this one, which has imported what takes long, and run the command line. Of two that train
together either one is killed, and the other then as well, as torchrun does.

With `--way terminate` the process sends itself SIGTERM instead, as SLURM and Kubernetes do, and must end all processes
by itself. With `--way max_time`, the time of `--trainer.max_time` is over at the moment; the run goes on without that
option. A run that `max_time` ends validates once more than the one in peace, so only weights, optimizer, schedule and
number of steps are compared.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kill_resume import distance
from lightning.pytorch.callbacks import Timer
from resume_points import write_rows

from prlhf_lightning.cli.main import main
from prlhf_lightning.inference.kv_cache import BatchedKVCache
from prlhf_lightning.online.rewards import RewardSum
from prlhf_lightning.training import OnlineRL, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.loggers import MetricsFile
from prlhf_lightning.utils import io

COMMAND = {
    "trainer.max_epochs": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.num_sanity_val_steps": 0,
    "trainer.log_every_n_steps": 2,
    "checkpoint.every_n_train_steps": 1,
    "collapse.prompts": 0,
    "model.user_model": "IndividualUserModel",
    "model.user_model.num_tokens": 2,
    "model.policy": "CausalLMPolicy",
    "model.policy.model": "builtin:byte-lm",
    "model.policy.random_init": 0,
    "model.policy.lora": "{rank: 2, dropout: 0.1}",  # the random state must be resumed as well
    "model.loss": "DPOLoss",
    "model.optim": "{lr: 0.01, user_lr: 0.1}",
    "data.source": "FileSource",
    "data.batch_size": 3,
    "data.validation_fraction": 0.2,
    "ckpt_path": "last",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"trainer.accumulate_grad_batches": 3, "trainer.val_check_interval": 4},
    "sampled_terms": {"trainer.accumulate_grad_batches": 2, "model.sample_terms": "true"},
    "streamed": {"data.streaming": "true", "data.shuffle_buffer": 8, "data.validation_fraction": 0},
    "workers": {"data.num_workers": 1, "trainer.val_check_interval": 3},
    "kto": {"model.loss": "KTOLoss", "trainer.accumulate_grad_batches": 2},
    "bco": {"model.loss": "BCOLoss", "trainer.val_check_interval": 3},
    "amortized": {"model.user_model": "AmortizedUserModel", "model.user_model.rank": 2},
    "full": {"model.policy.lora": "null"},
    "bucketed": {"data.max_tokens_per_batch": 300, "data.pairs_per_user": 2},
    "never_validated": {"trainer.limit_val_batches": 0},
    "monitored": {"collapse.prompts": 2, "collapse.max_new_tokens": 4, "checkpoint.save_top_k": 2},
    "warmed_up": {"model.optim.warmup_steps": 4, "trainer.max_steps": 9, "data.balance": 0.5},
    "baseline": {"train_baseline": "true", "trainer.max_epochs": 1},
    "continued": {"init_from": "{root}/first/runs/version_0/checkpoints/last.ckpt", "trainer.val_check_interval": 3},
    "online": {
        "model.loss": "GRPOLoss",
        "model.loss.beta": 0.1,
        "model.rewards": "[{function: kill_points.vowels}]",
        "model.policy.lora": "{rank: 2}",
        "model.answers_per_prompt": 3,
        "model.updates": 2,
        "model.micro_batch_size": 2,
        "model.alpha": 0.7,  # whose draws must be resumed as well
        "model.sampling.max_new_tokens": 8,
        "trainer.val_check_interval": 4,
        "collapse.prompts": None,
    },
    "two_processes": {"trainer.strategy": "ddp", "trainer.devices": 2, "trainer.val_check_interval": 2},
    "sharded": {
        "trainer.strategy": "{class_path: prlhf_lightning.FSDP2Strategy}",
        "trainer.devices": 2,
        "trainer.val_check_interval": 2,
    },
}
TIMED = ("per_second", "peak_memory")
TOLERANCE = 1e-5  # of several processes, whose sums may be added in another order
STOPPED = 128 + signal.SIGTERM  # exit status of a process that was told to stop


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """Reward the share of vowels; a reward for online RL."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


# ---- where a process dies


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Tell this process to stop as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


def run_out_of_time() -> None:
    """Let all time of `--trainer.max_time` be over."""
    Timer.time_elapsed = lambda self, stage=None: float(1 << 30)  # type: ignore[method-assign]


WAYS: dict[str, Callable[[], None]] = {"kill": die, "terminate": terminate, "max_time": run_out_of_time}


def count_calls(owner: Any, name: str, reached: Callable[[], None], after: bool = False) -> None:
    """Have a function report each of its calls."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not after:
            reached()
        result = original(*args, **kwargs)
        if after:
            reached()
        return result

    setattr(owner, name, call)


def watch_writes(part: str, kind: str, reached: Callable[[], None]) -> None:
    """Report each write to files whose name has a part, when half of it is on the disk."""
    original = io._Output.write

    def write(self: Any, data: Any) -> int:
        if part in Path(self.name).name:
            half = memoryview(data)[: len(data) // 2]
            original(self, half)
            reached()
            return len(half) + original(self, memoryview(data)[len(half) :])
        return original(self, data)

    io._Output.write = write  # type: ignore[method-assign]


def watch_renames(part: str, after: bool, reached: Callable[[], None]) -> None:
    """Report when a complete file takes its place, before or after that."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        is_meant = part in Path(target).name
        if is_meant and not after:
            reached()
        original(source, target)
        if is_meant and after:
            reached()

    os.replace = replace


def watch_rows(reached: Callable[[], None]) -> None:
    """Report when a row of `metrics.csv` is half written."""
    original = MetricsFile.save

    def save(self: MetricsFile) -> None:
        path = Path(self.metrics_file_path)
        before, inode = (path.stat().st_size, path.stat().st_ino) if path.exists() else (0, 0)
        original(self)
        # A file with a new header takes the old one's place whole.
        if path.exists() and (size := path.stat().st_size) > before and path.stat().st_ino == inode:
            whole = path.read_bytes()
            os.truncate(path, (before + size) // 2)
            reached()
            path.write_bytes(whole)

    MetricsFile.save = save  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "micro-batch": partial(count_calls, PersonalizedLM, "training_step"),
    "step": partial(count_calls, PersonalizedLM, "optimizer_step", after=True),
    "generated token": partial(count_calls, BatchedKVCache, "advance"),
    "rewards": partial(count_calls, RewardSum, "__call__", after=True),
    "update": partial(count_calls, OnlineRL, "configure_gradient_clipping"),
    "epoch's end": partial(count_calls, PersonalizedLM, "on_train_epoch_end"),
    "validation": partial(count_calls, PersonalizedLM, "validation_step", after=True),
    "validation's end": partial(count_calls, PersonalizedLM, "on_validation_epoch_end", after=True),
    "best half written": partial(watch_writes, ".best-", "best"),
    "last half written": partial(watch_writes, ".last.ckpt", "last"),
    "best written": partial(watch_renames, "best-", True),
    "last not renamed": partial(watch_renames, "last.ckpt", False),
    "last renamed": partial(watch_renames, "last.ckpt", True),
    "row half written": watch_rows,
    "header half written": partial(watch_writes, ".metrics.csv", "metrics"),
    "users half written": partial(watch_writes, ".users_seen", "users"),
}


def start(
    name: str,
    root: Path,
    folder: Path,
    moment: tuple[str, int] | None,
    counts: Path | None = None,
    way: str = "kill",
) -> int:
    """Run the command of a configuration to its end or death; return the exit status, negative where it was killed.

    Args:
        name: The configuration.
        root: Folder of the data.
        folder: What this run, and the runs that go on with it, write to.
        moment: Where it dies, and the how manieth time that it is there.
        counts: File for how often each moment was reached.
        way: How it dies.
    """
    settings = {**COMMAND, **CONFIGURATIONS[name]}
    if "init_from" in settings:
        settings["init_from"] = settings["init_from"].format(root=root)
    if moment is not None and way == "max_time":
        settings["trainer.max_time"] = "99:00:00:00"
    processes = settings.get("trainer.devices", 1)
    data = "thumbs" if settings["model.loss"] == "KTOLoss" else "pairs"
    settings |= {"data.source.train": root / f"{data}.jsonl", "trainer.default_root_dir": folder / "runs"}
    settings["data.cache_dir"] = folder / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    victim = sum(map(ord, str(moment))) % processes
    pids = []
    for rank in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PRLHF_CACHE"] = str(folder / "cache")
            if processes > 1:  # what torchrun tells a process
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                told |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "k"}
                os.environ.update({key: str(value) for key, value in told.items()})
            reached: Counter[str] = Counter()
            for kind, watch in MOMENTS.items():
                watch(partial(_reached, reached, kind, moment if rank == victim else None, WAYS[way]))
            main(["fit", *(f"--{key}={value}" for key, value in settings.items() if value is not None)])
            if counts is not None and rank == 0:
                counts.write_text(json.dumps(reached))
            is_over = moment is not None and way == "max_time" and reached[moment[0]] >= moment[1]
            os._exit(STOPPED if is_over else 0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException as error:
            print("ended with", repr(error), flush=True)
            os._exit(1)
    return _wait(pids)


def _reached(counter: Counter[str], kind: str, moment: tuple[str, int] | None, end: Callable[[], None]) -> None:
    counter[kind] += 1
    if moment == (kind, counter[kind]):
        end()


def _wait(pids: list[int]) -> int:
    """Wait for processes; once one has died, end the others, but not if it stopped in an orderly way."""
    status, left = 0, set(pids)
    while left:
        pid, code = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(code)
        if code and not status:
            status = code
            for other in left if code != STOPPED else ():
                os.kill(other, signal.SIGKILL)
    return status


# ---- what it leaves


def result(folder: Path) -> dict[str, Any]:
    """Return what the newest run of a folder holds."""
    runs = sorted(folder.glob("runs/version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    run = runs[-1]
    found: dict[str, Any] = {"steps": None}
    for path in sorted(run.glob("checkpoints/*.ckpt")):
        content = checkpoint_files.load(path)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            found[f"{path.name} {key}"] = content[key]
        if path.name == "last.ckpt":
            for state in content["callbacks"].values():
                if "best_k_models" in state:
                    models = {Path(model).name: score for model, score in state["best_k_models"].items()}
                    found["best"] = [models, Path(state["best_model_path"]).name, state["best_model_score"]]
    for name in ("metrics.csv", "baseline/metrics.csv"):
        if (run / name).exists():
            with (run / name).open(newline="") as file:
                found[name] = [
                    {key: _number(value) for key, value in row.items() if not any(part in key for part in TIMED)}
                    for row in csv.DictReader(file)
                ]
    for path in sorted(run.glob("*.csv")):
        if path.name != "metrics.csv":
            found[path.name] = path.read_text()
    if (comparison := run / "comparison.json").exists():
        found[comparison.name] = {
            name: {key: value for key, value in values.items() if not any(part in key for part in TIMED)}
            for name, values in json.loads(comparison.read_text()).items()
        }
    if (baseline := run / "baseline" / "last.ckpt").exists():
        found["baseline"] = checkpoint_files.load(baseline)["state_dict"]
    return found


def _number(text: str) -> Any:
    """Return a value of a cell that equals itself, which NaN as a number does not."""
    return torch.tensor(float(text), dtype=torch.float64) if text not in ("", "nan") else text


def differences(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> list[str]:
    """Return the names of what is not the same."""
    names = sorted(expected.keys() | found.keys())
    return [n for n in names if not distance(expected.get(n), found.get(n)) <= tolerance]


# ---- the trials


def trials(
    counts: dict[str, int], chosen: list[str], pairs: int, singles: int, draw: random.Random
) -> Iterator[list[tuple[str, int]]]:
    """Yield moments of chosen kinds at which a run, and the one that goes on with it, are killed."""

    def at(kind: str) -> tuple[str, int]:
        return kind, draw.randint(1, counts[kind])

    kinds = [kind for kind in chosen if counts.get(kind)]
    every = [[at(kind)] for kind in kinds for _ in range(max(1, singles // len(kinds)))]
    yield from every if singles >= len(kinds) else draw.sample(every, singles)
    # The second run is shorter: early moments are sure to come.
    double = [[at(one), (other, draw.randint(1, 2))] for one, other in itertools.product(kinds, kinds)]
    yield from double if pairs < 0 or pairs >= len(double) else draw.sample(double, pairs)


#: Exit statuses of a process that was ended: killed, stopped, or told to stop before or after it trained.
_ENDS = (-signal.SIGKILL, STOPPED, -signal.SIGTERM)


def measure(
    name: str, kinds: list[str], pairs: int, singles: int, seed: int, root: Path, way: str = "kill"
) -> list[str]:
    """Try a configuration; return what went wrong."""
    draw, began = random.Random(f"{seed} {name}"), time.time()
    first = root / "first"
    if "init_from" in CONFIGURATIONS[name] and not first.exists() and start("plain", root, first, None):
        return [f"{name}: the first run failed: {_said(first)}"]
    peace = root / name / "peace"
    if start(name, root, peace, None, root / name / "counts.json"):
        return [f"{name}: the run in peace failed: {_said(peace)}"]
    counts = json.loads((root / name / "counts.json").read_text())
    expected = result(peace)
    if way == "max_time":
        expected = {key: value for key, value in expected.items() if key.startswith("last.ckpt")}
    tolerance = TOLERANCE if "trainer.devices" in CONFIGURATIONS[name] else 0.0
    wrong, kills, doubles, runs = [], 0, 0, 0
    for number, moments in enumerate(trials(counts, kinds, pairs, singles, draw)):
        folder = root / name / f"run-{number}"
        died, before = 0, len(wrong)
        for moment in [*moments, None]:
            status = start(name, root, folder, moment, way=way)
            died += status in _ENDS
            if status not in (0, *_ENDS) or (moment is None and status):
                wrong.append(f"{name}: {moments}: exit {status}: {_said(folder)}")
                break
        else:
            found = {key: value for key, value in result(folder).items() if way != "max_time" or key in expected}
            if other := differences(expected, found, tolerance):
                wrong.append(f"{name}: killed at {moments}: {', '.join(other)} differ")
        if len(wrong) > before:
            print(wrong[-1], flush=True)
        runs, kills, doubles = runs + 1, kills + died, doubles + (died > 1)
        shutil.rmtree(folder)
    print(
        f"{name}, {way}: {runs} runs, {kills} ended, {doubles} twice: {len(wrong)} ended differently "
        f"({time.time() - began:.0f} s)",
        flush=True,
    )
    return wrong


def _said(folder: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log-*.txt")))


def start_together(count: int, root: Path) -> list[str]:
    """Start runs of one folder at the same moment; return what went wrong."""
    folder = root / "together"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    loggers = ["true", "TensorBoardLogger", "false"]
    processes = [
        context.Process(target=_one_of_many, args=(barrier, root, folder, number, loggers[number % 3]))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    wrong = [f"run {number}: exit {one.exitcode}" for number, one in enumerate(processes) if one.exitcode]
    rates: Counter[str] = Counter()
    runs = sorted([*folder.glob("runs/version_*"), *folder.glob("events/*/version_*")])
    for run in runs:
        content = checkpoint_files.load(run / "checkpoints" / "last.ckpt")
        rate = content["hyper_parameters"]["optim"]["init_args"]["lr"] if "init_args" in (
            content["hyper_parameters"]["optim"]) else content["hyper_parameters"]["optim"]["lr"]  # fmt: skip
        rates[f"{rate:g}"] += 1
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows if row.get("train/loss")]
        if len(steps) != len(set(steps)) or max(float(row["train/lr"] or 0) for row in rows) > float(rate) * 1.001:
            wrong.append(f"{run.name}: rows of several runs in metrics.csv")
        if f"lr: {rate:g}" not in (run / "config.yaml").read_text():
            wrong.append(f"{run.name}: config.yaml is of another run than last.ckpt")
    if len(runs) != count or len(rates) != count:
        wrong.append(f"{len(runs)} folders of {len(rates)} runs, of {count}")
    print(f"{count} runs started together: {len(runs)} folders, {len(wrong)} mistakes", flush=True)
    return wrong


def _one_of_many(barrier: Any, root: Path, folder: Path, number: int, logger: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"log-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    settings: dict[str, Any] = {**COMMAND, "model.optim.lr": (number + 1) / 1000, "trainer.max_epochs": 1}
    settings |= {"data.source.train": root / "pairs.jsonl", "trainer.default_root_dir": folder / "runs"}
    settings |= {"data.cache_dir": folder / "cache", "trainer.logger": logger}
    if logger == "TensorBoardLogger":
        settings["trainer.logger.save_dir"] = folder / "events"
    barrier.wait()
    main(["fit", *(f"--{key}={value}" for key, value in settings.items())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--pairs", type=int, default=12, help="pairs of moments of each configuration; -1 for all")
    parser.add_argument("--singles", type=int, default=13, help="runs of each configuration that are killed once")
    parser.add_argument("--kinds", nargs="+", choices=MOMENTS, default=list(MOMENTS), help="kinds of moments")
    parser.add_argument("--way", choices=WAYS, default="kill", help="how a process ends at a moment")
    parser.add_argument("--together", type=int, default=0, help="start so many runs at once, and do nothing else")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place))
        if arguments.together:
            mistakes = start_together(arguments.together, Path(place))
        else:
            mistakes = [
                mistake
                for name in arguments.only
                for mistake in measure(
                    name,
                    arguments.kinds,
                    arguments.pairs,
                    arguments.singles,
                    arguments.seed,
                    Path(place),
                    arguments.way,
                )
            ]
    print("\n".join(mistakes))
    sys.exit(bool(mistakes))
