"""Everything that only a GPU can tell, in under nine minutes.

    python benchmarks/gpu.py --out runs/gpu --model MODEL_FOLDER --data POLIS_FOLDER  # on one GPU, all parts
    python benchmarks/gpu.py --out runs/gpu --only step_8b                            # one part again
    python benchmarks/gpu.py                                                          # without a GPU: the plan
    python benchmarks/gpu.py --out runs/rehearsal --rehearse                          # every part, tiny, on the CPU

Each part runs in a process of its own, with a limit of its own. In the folder `--out`, each result is added to
`results.jsonl` and to the table in `report.md` as soon as it is known, and all that a part prints to `PART.log`. Parts
that need more memory than the card has get fewer pairs, or are skipped. It needs no network; without the package `trl`
its contenders are left out. docs/benchmarks/gpu.md tells more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_memory import Counted, count
from gpu_parts import POLIS, RESULT, SHARING, STEPS, Sizes

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "lightning", "trl")
_SPARE = 0.9  # share of a card's memory to plan for
_SHOWN = 15  # last lines of a failed part


@dataclass(frozen=True)
class Part:
    """A part of the program.

    Attributes:
        name: As `--only` takes it.
        seconds: Its limit.
        does: What it does.
        options: Further words for `gpu_parts.py`.
        skipped: Why it does not run; empty if it does.
    """

    name: str
    seconds: int
    does: str
    options: tuple[str, ...] = ()
    skipped: str = ""


class Report:
    """The files that results go to as they come.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._results, self._table = folder / "results.jsonl", folder / "report.md"
        about = {"command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]), **machine()}
        self._add(self._results, json.dumps({"part": "about", **about}))
        words = "; ".join(f"{name} {value}" for name, value in about.items() if name != "command")
        self._add(self._table, f"\n`{about['command']}` on {words}\n\n| part | what | result |\n|---|---|---|")

    def add(self, part: str, result: dict[str, object]) -> None:
        """Add a result to both files, and print it."""
        self._add(self._results, json.dumps({"part": part, **result}))
        values = ", ".join(f"{name} {value}" for name, value in result.items() if name != "what")
        self._add(self._table, f"| {part} | {result['what']} | {values} |".replace("\n", " "))
        print(f"  {result['what']}: {values}", flush=True)

    def close(self, lines: Sequence[str]) -> None:
        """Write the summary."""
        self._add(self._table, "\n" + "\n".join(lines))

    @staticmethod
    def _add(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text + "\n")


def machine() -> dict[str, str]:
    """Return what runs: the device and the versions of packages."""
    found = {"device": platform.machine() + f", {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {found['device']}"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def steps_part(name: str, seconds: int, sizes: Sizes, memory: float | None, rehearse: bool) -> Part:
    """Plan a part that takes training steps, with so many pairs that they fit into `memory` GiB."""
    counted, pairs = count(sizes.model), sizes.pairs
    while memory is not None and pairs > 1 and need(counted, replace(sizes, pairs=pairs)) > _SPARE * memory:
        pairs //= 2
    planned = replace(sizes, pairs=pairs)
    needed = need(counted, planned)
    what = (
        "prompt once or twice, padded or packed" if name == "sharing" else "time and peak memory of steps beside TRL's"
    )
    does = (
        f"{what}: {sizes.model} parameters in bfloat16, LoRA, {pairs} pairs of {'/'.join(map(str, sizes.shape))} tokens"
        f"{', layers recomputed' if sizes.checkpointing else ''}; weights {counted.weights / 2**30:.1f} GiB, with a "
        f"step of P-DPO about {needed:.0f} GiB"
    )
    too_large = memory is not None and needed > _SPARE * memory and not rehearse
    options = () if rehearse else ("--pairs", str(pairs))
    return Part(name, seconds, does, options, f"the card has {memory:.0f} GiB" if too_large else "")


def need(counted: Counted, sizes: Sizes) -> float:
    """Return the GiB of a step of P-DPO."""
    return counted.step(sizes.positions, sizes.checkpointing)


def plan(args: argparse.Namespace) -> list[Part]:
    """Return all parts, in the order in which they run."""
    has_gpu = torch.cuda.is_available() and not args.rehearse
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if has_gpu else None
    given = args.model is not None and args.data is not None
    fit = f"{POLIS['steps']} steps of {POLIS['pairs']} pairs on {args.data or '--data'} from {args.model or '--model'}"
    options = ("--model", str(args.model), "--data", str(args.data), "--folder", str(args.out)) if given else ()
    parts = [
        Part("tests", 130, "the tests that need a GPU: tests/test_gpu.py and others marked `gpu`"),
        steps_part("step_1b", 75, STEPS["step_1b"], memory, args.rehearse),
        steps_part("step_8b", 120, STEPS["step_8b"], memory, args.rehearse),
        Part("polis", 110, f"fit, {fit}", options, "" if given else "--model and --data were not given"),
        steps_part("sharing", 75, SHARING["sharing"], memory, args.rehearse),
    ]
    return [part for part in parts if args.only in (None, part.name)]


def run(part: Part, report: Report, args: argparse.Namespace) -> str:
    """Run a part; return how it ended, in a word or with the last lines of what it printed."""
    command = [sys.executable, "-u", str(HERE / "gpu_parts.py"), part.name, *part.options]
    if args.rehearse:
        command.append("--rehearse")
    last: deque[str] = deque(maxlen=_SHOWN)
    errors = 0
    limit = args.limit or part.seconds
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = args.out / f"{part.name}.log"
    with log.open("w") as file, log.open() as printed:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        running, rest = True, ""
        try:
            while running:
                running = process.poll() is None and time.monotonic() - start < limit
                *lines, rest = (rest + printed.read()).split("\n")
                for line in lines:
                    if line.startswith(RESULT):
                        result = json.loads(line.removeprefix(RESULT))
                        errors += "error" in result
                        report.add(part.name, result)
                    elif line.strip():
                        last.append(line)
                if running:
                    time.sleep(0.2)
        finally:
            is_late = process.poll() is None
            if is_late:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    if process.returncode == 0:
        return f"ran in {seconds:.0f} s" + (f", with {errors} errors among its results" if errors else "")
    why = f"stopped at its limit of {limit} s" if is_late else f"failed after {seconds:.0f} s"
    return f"{why}. Its last lines:\n\n```\n" + "\n".join(last) + "\n```"


def main() -> None:
    """Run the parts, or say what they would do."""
    names = ("tests", *STEPS, "polis", *SHARING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--only", choices=names, metavar="PART", help=f"run one part: {', '.join(names)}")
    parser.add_argument(
        "--model", type=Path, help="folder of SmolLM2-135M-Instruct or another model, for the part polis"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with train.jsonl.gz and validation.jsonl.gz, for the part polis"
    )
    parser.add_argument("--rehearse", action="store_true", help="run every part with tiny sizes on the CPU")
    parser.add_argument("--limit", type=int, help="seconds of each part, in place of its own limit")
    args = parser.parse_args()
    parts = plan(args)
    would = not (torch.cuda.is_available() or args.rehearse)
    if would:
        print("There is no GPU here. With one, this would run:\n")
    for part in parts:
        print(
            f"{part.name}, at most {part.seconds} s: {part.does}"
            + (f"  [skipped: {part.skipped}]" * bool(part.skipped))
        )
    print(f"\nTogether at most {sum(part.seconds for part in parts if not part.skipped)} s.", flush=True)
    if would:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is stopped too
    report = Report(args.out)
    ends = {}
    for number, part in enumerate(parts, 1):
        print(f"\n[{number}/{len(parts)}] {part.name}: {part.does}", flush=True)
        ends[part.name] = f"skipped: {part.skipped}" if part.skipped else run(part, report, args)
    summary = [f"- {name}: {end}" for name, end in ends.items()]
    report.close(summary)
    print("\n" + "\n".join(summary))
    if any(not end.startswith(("ran", "skipped")) for end in ends.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
