"""Opens odd files with every command that opens files of that kind, and tells what was not refused in one line.

    OMP_NUM_THREADS=1 python benchmarks/fuzz_files.py                          # about 1,500 commands
    OMP_NUM_THREADS=1 python benchmarks/fuzz_files.py --count 100 --only export template --show all

A command is a fork of this process, so that nothing is imported twice. It may *finish*, as many files are odd and
harmless; be *refused*, by one error of a few lines that names a file, a setting or a column; or go wrong: a *trace*, a
*long* error, no answer within five seconds beyond what the same command takes with sound files (*slow*), more than a
gigabyte of memory beyond it (*large*), an end without a word (*silent*), or an end by a signal (*killed*). Damage by
chance, bit by bit, is in `fuzz_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import odd_files
import torch
from odd_files import Case, Sound

from prlhf_lightning.cli.commands import COMMANDS, Group, Task
from prlhf_lightning.cli.main import main as command_line

SECONDS, BYTES = 5.0, 1 << 30  # beyond what the same command takes with sound files
_GIVEN_UP = 60.0  # seconds on the clock, beyond four times what sound files take
_CHARACTERS = 3000  # of an error
#: What commands import when they need it, which takes seconds.
_IMPORTED = ("prlhf_lightning.cli.fit", "prlhf_lightning.serving.server", "transformers.models.llama.modeling_llama")
WRONG = ("trace", "long", "slow", "large", "silent", "killed")


@dataclass(frozen=True)
class Attempt:
    """What became of a command.

    Attributes:
        outcome: One of the words that this file begins with.
        seconds: How long it computed; other programs on the machine do not count.
        memory: Most bytes it held.
        said: The end of what it printed.
    """

    outcome: str
    seconds: float
    memory: int
    said: str


def attempt(words: Sequence[str], folder: Path, usual: Attempt | None = None) -> Attempt:
    """Run a command in a process of its own.

    Args:
        words: The command.
        folder: Where it runs and keeps its log.
        usual: The same command with sound files.
    """
    (log := folder / "log.txt").touch()
    started = time.monotonic()
    if not (pid := os.fork()):
        _run(words, folder, log)
    status, used = None, None
    while status is None:
        done, code, used = os.wait4(pid, os.WNOHANG)
        status = code if done else None
        if status is None:
            late = time.monotonic() - started > 4 * (usual.seconds if usual else 60) + _GIVEN_UP
            ready = words[0] == "serve" and "startup complete" in log.read_text(errors="replace")
            if late or ready:
                os.kill(pid, signal.SIGKILL)
                _, _, used = os.wait4(pid, 0)
                status = 0 if ready else -1
            time.sleep(0.02)
    said = log.read_text(errors="replace")
    seconds, memory = (used.ru_utime + used.ru_stime, used.ru_maxrss * 1024) if used else (0.0, 0)
    return Attempt(_outcome(status, seconds, memory, said, usual), seconds, memory, said)


def _outcome(status: int, seconds: float, memory: int, said: str, usual: Attempt | None) -> str:
    if re.search(r"(?m)^Traceback \(most recent call last\)", said) or "╭─" in said:
        return "trace"
    if usual and seconds > usual.seconds + SECONDS:
        return "slow"
    if os.WIFSIGNALED(status):
        return "killed"
    if usual and memory > usual.memory + BYTES:
        return "large"
    if not status:
        return "finished"
    error = said[said.rfind("error: ") :] if "error: " in said else ""
    if not error:
        return "silent"
    return "long" if len(error) > _CHARACTERS else "refused"


def _run(words: Sequence[str], folder: Path, log: Path) -> None:
    """Run a command in this process, a fork, and end it."""
    code = 1
    try:
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + 6 * BYTES,) * 2)
        command_line(list(words))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code & 0xFF)


def fuzz(cases: Sequence[Case], sound: Sound, folder: Path) -> Iterator[tuple[Case, Attempt]]:
    """Yield each case with what became of it; files of a case are gone by the next."""
    usual: dict[str, Attempt] = {}
    for case in cases:
        here = folder / "case"
        if case.usual not in usual:
            here.mkdir()
            usual[case.usual] = attempt(sound.words(case.usual, here, None), here)
            if usual[case.usual].outcome != "finished":
                sys.exit(f"The sound files were not taken by {case.usual}:\n{usual[case.usual].said[-3000:]}")
            shutil.rmtree(here)
        here.mkdir()
        words = sound.words(case.usual, here, case)
        yield case, attempt(words, here, usual[case.usual])
        shutil.rmtree(here)


def _tasks(group: Group) -> Iterator[str]:
    for member in group.members.values():
        if isinstance(member, Group):
            yield from _tasks(member)
        elif isinstance(member, Task):
            yield member.place.partition(".")[0]


def _told(kind: str, case: Case, found: Attempt) -> dict[str, Any]:
    numbers = {"seconds": round(found.seconds, 1), "MB": found.memory >> 20}
    told = {"kind": kind, "command": case.usual, "odd": case.name[:300], "is": found.outcome}
    return {**told, **numbers, "said": found.said[-1500:]}


def main() -> int:
    """Open odd files and print what went wrong; return how many did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="cases of each kind at most, drawn by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(odd_files.KINDS), choices=list(odd_files.KINDS))
    parser.add_argument("--show", nargs="*", default=list(WRONG), help="outcomes to print, or `all`")
    parser.add_argument("--keep", type=Path, help="folder of the sound files, which are made there if it is empty")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for module in (*_IMPORTED, *(f"prlhf_lightning.cli.{task}" for task in _tasks(COMMANDS))):
        import_module(module)
    totals: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        sound = Sound.made(arguments.keep or Path(name) / "sound", attempt)
        for kind in arguments.only:
            cases = list(odd_files.KINDS[kind](sound))
            draw = random.Random(arguments.seed)
            cases = draw.sample(cases, min(len(cases), arguments.count))
            for case, found in fuzz(cases, sound, Path(name)):
                totals.setdefault(kind, Counter())[found.outcome] += 1
                slowest = max(slowest, found.seconds)
                if found.outcome in arguments.show or "all" in arguments.show:
                    print(json.dumps(_told(kind, case, found)), flush=True)
    every: Counter[str] = sum(totals.values(), Counter())
    for kind, counts in {**totals, "all": every}.items():
        print(f"{kind:12}" + "  ".join(f"{outcome} {count}" for outcome, count in counts.most_common()))
    print(f"slowest: {slowest:.1f} s")
    return sum(every[outcome] for outcome in WRONG)


if __name__ == "__main__":
    sys.exit(main() > 0)
