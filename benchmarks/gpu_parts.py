"""What `gpu.py` measures: each part prints one line of JSON for each result, as soon as it has it.

    python benchmarks/gpu_parts.py step_1b

`gpu.py` runs each part in a process of its own. A part that needs more memory than the card has is left to it to skip.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

REPO = Path(__file__).resolve().parent.parent
RESULT = "RESULT "  # begins a line that holds a result


@dataclass(frozen=True)
class Sizes:
    """Sizes of a measurement of steps.

    Attributes:
        model: A model of `contenders.py`.
        shape: Tokens of prompt, chosen and rejected completion.
        pairs: Pairs in a batch.
        checkpointing: Whether layers are recomputed in the backward pass.
        repeats: Timed steps.
    """

    model: str
    shape: tuple[int, int, int]
    pairs: int
    checkpointing: bool
    repeats: int = 7

    @property
    def positions(self) -> int:
        """Positions that a step of P-DPO computes: both terms, and a prompt once only where layers are kept."""
        prompt, chosen, rejected = self.shape
        prompts = 2 if self.checkpointing else 1
        return 2 * self.pairs * (prompts * (prompt + 10) + chosen + rejected)


STEPS = {
    "step_1b": Sizes("1b", (512, 256, 256), 8, checkpointing=False),
    "step_8b": Sizes("8b", (512, 256, 256), 8, checkpointing=True, repeats=4),
}
SHARING = {"sharing": Sizes("1b", (1024, 256, 256), 8, checkpointing=True, repeats=5)}
REHEARSED = Sizes("tiny", (24, 8, 8), 2, checkpointing=True, repeats=1)
#: Ours first, since a part may run out of time. What takes all turns at 8B would be too long.
CONTENDERS = [
    "our P-DPO, cached reference",
    "TRL DPO, online reference",
    "our DPO, cached reference",
    "TRL DPO, precomputed reference",
    "our P-DPO, cached reference, sample_terms",
    "our P-DPO, online reference",
    "authors' P-DPO scheme",
    "our P-DPO, cached reference, packing",
]
POLIS = {"steps": 300, "pairs": 64, "evaluated": 40}  # `evaluated` batches of validation


def tell(what: str, **values: float | str) -> None:
    """Print a result."""
    # In a line of its own, whatever came before.
    print("\n" + RESULT + json.dumps({"what": what, **values}), flush=True)


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Return the sizes of a part, with fewer pairs if that was asked for."""
    sizes = REHEARSED if args.rehearse else (STEPS | SHARING)[args.part]
    return replace(sizes, pairs=args.pairs or sizes.pairs)


def gpu_tests(args: argparse.Namespace) -> None:
    """Run the tests that need a GPU, and tell each as it ends; rehearsed, those of them that a CPU can run."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                if report.when == "teardown" and report.passed:
                    return
                last = {"error": report.longreprtext.splitlines()[-1]} if report.failed else {}
                tell(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1), **last)

    own = REPO / "tests/test_gpu.py"
    marked = [path for path in (REPO / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    marked.sort(key=lambda path: (len(path.parts), path))  # those of folders compile kernels and take longer
    files = [own] if args.rehearse else [own, *(path for path in marked if path != own)]
    which = ["-k", "step_changes and cpu"] if args.rehearse else ["-m", "gpu"]
    options = [
        "-q",
        "-s",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(REPO),
        "-c",
        str(REPO / "pyproject.toml"),
    ]
    code = pytest.main([*options, *which, *map(str, files)], plugins=[Reporter()])
    if code:
        raise SystemExit(f"pytest ended with {code!r}")


def steps(args: argparse.Namespace) -> None:
    """Time steps and measure their peak memory, contender by contender, with the same weights."""
    from contenders import contenders, make_batch, save_model
    from peak_memory import peak_of
    from step_time import measure

    sizes = sizes_of(args)
    how = argparse.Namespace(
        device=args.device, dtype=args.dtype, checkpointing=sizes.checkpointing, packed=args.device == "cuda"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(sizes.model, Path(folder))
        batch = make_batch(sizes.shape, sizes.pairs, args.device)
        makers = contenders(path, batch, how, lora=True)
        for name in (name for name in CONTENDERS if name in makers):
            with telling_errors(name):
                step = makers[name]()
                peak = peak_of(step, args.device)
                seconds = measure({name: lambda step=step: step}, sizes.repeats, args.device)[name]
                tell(
                    name,
                    ms=round(1e3 * statistics.median(seconds), 1),
                    fastest=round(1e3 * min(seconds), 1),
                    slowest=round(1e3 * max(seconds), 1),
                    peak_MiB_of_a_step=round(peak),
                    **allocated(args.device),
                )
            step = None
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


def sharing(args: argparse.Namespace) -> None:
    """Compare the ways of computing a prompt once, packed trees among them, in batches with and without padding."""
    import prompt_sharing as ways
    from contenders import make_batch, save_model

    sizes = sizes_of(args)
    ways.scoring._MIN_SAVED_BY_CACHE = ways.scoring._MIN_SAVED_BY_TREES = 0.0  # this measures them
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(sizes.model, Path(folder))
        for mode in ("lora", "checkpointing"):
            policy = ways.make_policy(path, mode, args.device, args.dtype)
            for ragged in (False, True):
                batch = make_batch(sizes.shape, sizes.pairs, args.device, ragged)
                times: dict[str, float] = {}
                for way in ways.ways_of(policy):  # one after another, so that each one's failure is its own
                    name = f"{mode}, {'lengths differ' if ragged else 'no padding'}, prompt {way}"
                    with telling_errors(name):
                        step = ways.make_step(policy, batch.prompt, [batch.chosen, batch.rejected], way)
                        times[way] = statistics.median(ways.measure({way: step}, sizes.repeats, time.perf_counter)[way])
                        ratio = {"ratio_to_twice": round(times[way] / times["twice"], 3)} if "twice" in times else {}
                        tell(name, ms=round(times[way], 1), **ratio)


def polis(args: argparse.Namespace) -> None:
    """Fit a model to pairs of real people for a few steps, and tell what validation says."""
    from prlhf_lightning.cli.main import main

    train, validation = (args.data / f"{name}.jsonl.gz" for name in ("train", "validation"))
    size = POLIS if not args.rehearse else {"steps": 2, "pairs": 2, "evaluated": 1}
    root = args.folder / "polis"
    start = time.perf_counter()
    command = ["fit", "--config", str(REPO / "configs/p_dpo.yaml"), "--model.policy.model", str(args.model)]
    command += ["--data.source.train", str(train), "--data.source.validation", str(validation)]
    command += ["--trainer.limit_train_batches", str(size["steps"]), "--data.batch_size", str(size["pairs"])]
    command += ["--trainer.limit_val_batches", str(size["evaluated"]), "--data.eval_batch_size", str(size["pairs"])]
    command += ["--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0"]
    command += ["--trainer.enable_progress_bar", "false", "--model.policy.gradient_checkpointing", "false"]
    command += ["--model.sample_terms", "true", "--trainer.accelerator", "gpu" if args.device == "cuda" else "cpu"]
    command += ["--model.policy.dtype", args.dtype, "--trainer.default_root_dir", str(root)]
    command += ["--data.max_prompt_length", "64", "--data.max_completion_length", "96"]
    main(command)
    seconds = time.perf_counter() - start
    newest = max(root.rglob("metrics.csv"), key=os.path.getmtime)
    last: dict[str, float] = {}
    for row in csv.DictReader(newest.open()):
        last |= {name: float(value) for name, value in row.items() if value}
    values = {name: round(value, 4) for name, value in sorted(last.items()) if name.startswith("val/")}
    tell(f"fit, {size['steps']} steps of {size['pairs']} pairs", seconds=round(seconds, 1), **values)
    tell("fit, memory", **allocated(args.device))


class telling_errors:
    """Tell an error as a result and go on: what one contender lacks, the others need not."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        print(f"... {self._what}", flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        tell(self._what, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        return True


def allocated(device: str) -> dict[str, float]:
    """Return the most memory that this process has held on the GPU."""
    return {"allocated_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if device == "cuda" else {}


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tests": gpu_tests,
    "step_1b": steps,
    "step_8b": steps,
    "sharing": sharing,
    "polis": polis,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--pairs", type=int, help="pairs in a batch, in place of the part's own number")
    parser.add_argument("--model", type=Path, help="folder of the model of the part polis")
    parser.add_argument("--data", type=Path, help="folder of its train.jsonl.gz and validation.jsonl.gz")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the part polis writes its run")
    args = parser.parse_args()
    args.device, args.dtype = ("cpu", "float32") if args.rehearse else ("cuda", "bfloat16")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    PARTS[args.part](args)


if __name__ == "__main__":
    sys.exit(main())
