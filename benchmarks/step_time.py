"""Time of an optimization step: ours, TRL's DPOTrainer, and the authors' scheme, side by side in one run.

    python benchmarks/step_time.py                       # all shapes, 20M and 125M parameters, LoRA and full, on CPU
    python benchmarks/step_time.py --models 1b --dtype bfloat16 --device cuda --packed

What a step is, `contenders.py` tells. The contenders take turns, and every figure is the median over the repeats with
the quartiles beside it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from contenders import MODELS, Step, contenders, environment, make_batch, save_model, size_of
from rich.console import Console

SHAPES = [(300, 150, 150), (512, 100, 100), (1024, 64, 64), (100, 250, 250)]


def measure(makers: dict[str, Callable[[], Step]], repeats: int, device: str) -> dict[str, list[float]]:
    """Let the contenders take turns; return seconds a step."""
    steps = {name: make() for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first is warm-up
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure every model, mode and shape asked for, and write the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20m", "125m"], choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument(
        "--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="indices of the shapes to run"
    )
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also time our P-DPO with torch.compile")
    parser.add_argument("--packed", action="store_true", help="also time our P-DPO with packing (cuda)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers' states in backward")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/step_time.md"))
    args = parser.parse_args()
    if args.packed and args.device != "cuda":
        parser.error("--packed needs --device cuda: on a CPU, packing changes nothing")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    lines = [
        "# Time of a step",
        "",
        f"`python benchmarks/step_time.py {' '.join(sys.argv[1:])}` on {environment(args)}; {size_of(args)}, "
        f"{args.repeats} repeats.",
        "",
        "Milliseconds a step, median (quartiles); ratio to TRL's DPO with its online reference.",
        "",
    ]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            path = save_model(model, Path(folder))
            for mode in args.modes:
                for shape in (SHAPES[i] for i in args.shapes):
                    batch = make_batch(shape, args.pairs, args.device)
                    makers = contenders(path, batch, args, mode == "lora")
                    times = measure(makers, args.repeats, args.device)
                    base = statistics.median(times["TRL DPO, online reference"])
                    lines += [
                        f"## {model}, {mode}, prompt {shape[0]}, chosen {shape[1]}, rejected {shape[2]}",
                        "",
                        "| | ms | ratio |",
                        "|---|---:|---:|",
                    ]
                    for name, seconds in times.items():
                        low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
                        lines.append(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {middle / 1e3 / base:.2f} |")
                    lines.append("")
                    console.print("\n".join(lines[-len(times) - 5 :]))
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    args.output.write_text("\n".join(lines))
                    gc.collect()


if __name__ == "__main__":
    main()
