"""Peak memory of an optimization step at a vocabulary of 128k, each contender in a process of its own.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --device cuda --model 1b --dtype bfloat16

Peak resident memory (on a GPU: peak of the allocator) of two steps, less what the process held when the model was
built: what the step itself costs, gradients and optimizer state included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from contenders import MODELS, Step, contenders, environment, make_batch, save_model
from reporting import tell


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(step: Step, device: str) -> float:
    """Return what two steps add at their peak, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building
        before = resident()
    step()
    step()
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**10 - before / 2**20


def measure(name: str, path: Path, args: argparse.Namespace) -> float:
    """Return what two steps of one contender add at their peak, in MiB."""
    batch = make_batch(tuple(args.shape), args.pairs, args.device)
    return peak_of(contenders(path, batch, args, args.mode == "lora")[name](), args.device)


def main() -> None:
    """Measure every contender and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="128k", choices=MODELS)
    parser.add_argument("--mode", default="lora", choices=["lora", "full"])
    parser.add_argument("--shape", nargs=3, type=int, default=[128, 256, 256], help="prompt, chosen, rejected")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers' states in backward")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # this process's contender
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if args.only:
        print(json.dumps(measure(args.only, args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(args.model, Path(folder))
        batch = make_batch(tuple(args.shape), args.pairs, "cpu")
        peaks = {}
        for name in contenders(path, batch, args, args.mode == "lora"):
            command = [sys.executable, *sys.argv, "--only", name, "--folder", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[name] = json.loads(done.stdout.splitlines()[-1])
    base = peaks["TRL DPO, online reference"]
    sizes = MODELS[args.model]
    lines = [
        f"`python benchmarks/peak_memory.py {' '.join(sys.argv[1:])}` on {environment(args)}. {args.mode}, "
        f"{args.pairs} pairs, prompt {args.shape[0]}, completions {args.shape[1]} and {args.shape[2]}, vocabulary "
        f"{sizes['vocab_size']:,}, width {sizes['hidden_size']}, {sizes['num_hidden_layers']} layers.",
        "",
        "| | peak MiB of a step | ratio to TRL, online reference |",
        "|---|---:|---:|",
        *(f"| {name} | {peak:,.0f} | {peak / base:.2f} |" for name, peak in peaks.items()),
    ]
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
