"""When it pays to compute the prompt once for both completions of a pair.

    python benchmarks/prompt_sharing.py --out docs/benchmarks/prompt_sharing.md

A step is forward and backward of the chosen and the rejected completion under a Llama of random weights, in each of the
ways that `prlhf_lightning/policies/scoring.py` knows: the prompt twice, in a row of each completion; once, its keys and
values continued by both (cache); and once, as the trunk of a tree whose branches they are. The ways take turns, in an
order that alternates, and a ratio is the median over turns of the ratios within a turn. Layers that are recomputed in
backward keep no keys and values, so that there is no cache then.

The second and the third way are faster if the share of saved positions is at least `_MIN_SAVED_BY_CACHE` and
`_MIN_SAVED_BY_TREES` in `scoring.py`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from contenders import MODELS, RandomPolicy, make_batch, save_model
from reporting import tell

from prlhf_lightning.policies import CausalLMPolicy, scoring
from prlhf_lightning.policies.scoring import Capabilities
from prlhf_lightning.types import Tokens

SHAPES = ["300/150/150", "512/100/100", "1024/64/64", "100/250/250"]
MODES = ("lora", "checkpointing", "full")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WAYS = {
    "twice": Capabilities(head=True, shared_prompt=False),
    "cache": Capabilities(head=True, shared_prompt=True),
    "tree": Capabilities(head=True, shared_prompt=False, trees=True),
}


def make_policy(path: Path, mode: str, device: str = "cpu", dtype: str = "float32") -> CausalLMPolicy:
    """Build a Llama of random weights, with adapters of rank 16 unless it is trained in full."""
    how = argparse.Namespace(device=device, dtype=dtype, checkpointing=mode == "checkpointing")
    policy = RandomPolicy(path, how, lora=mode != "full", packing=device == "cuda")  # on a CPU, nothing is packed
    policy.build(with_reference=False)
    _ = policy.tokenizer  # which would be read when it is first used
    return policy.to(device).train()


def ways_of(policy: CausalLMPolicy) -> list[str]:
    """Return the ways that a policy can take; recomputed layers keep no cache."""
    return [way for way in WAYS if way != "cache" or not policy.gradient_checkpointing]


def make_step(policy: CausalLMPolicy, prompt: Tokens, completions: list[Tokens], way: str) -> Callable[[], None]:
    """Return one forward and backward, its way of computing the prompt forced."""

    def step() -> None:
        policy.shortcuts = WAYS[way]
        chosen, rejected = policy.log_probs(prompt, completions)
        torch.nn.functional.softplus(rejected.sum - chosen.sum).mean().backward()
        policy.zero_grad(set_to_none=True)
        if chosen.sum.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Let the ways take turns; return milliseconds a step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = clock()
            steps[name]()
            if turn:  # the first is warm-up
                times[name].append(1e3 * (clock() - start))
    return times


def row(policy: CausalLMPolicy, shape: str, args: argparse.Namespace) -> str:
    """Measure one shape; return its line of the table."""
    lengths = tuple(map(int, shape.split("/")))
    batch = make_batch(lengths, args.pairs, "cpu")
    steps = {way: make_step(policy, batch.prompt, [batch.chosen, batch.rejected], way) for way in ways_of(policy)}
    times = measure(steps, args.repeats, CLOCKS[args.clock])
    cells = [shape, f"{lengths[0] / (2 * lengths[0] + sum(lengths[1:])):.2f}", spread(times["twice"], ".0f")]
    for way in ("cache", "tree"):
        ratios = [once / twice for once, twice in zip(times.get(way, ()), times["twice"], strict=False)]
        cells.append(spread(ratios, ".2f") if ratios else "")
    return f"| {' | '.join(cells)} |"


def spread(values: list[float], form: str) -> str:
    """Write a median with its range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def cpu_name() -> str:
    """Return the processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Measure every model, mode and shape asked for, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20m"], choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=["lora", "checkpointing"], choices=MODES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens of the prompt/chosen/rejected")
    parser.add_argument("--pairs", type=int, default=1, help="pairs in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu counts the process's own time")
    parser.add_argument("--out", type=Path, help="write the table to a file as well")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scoring._MIN_SAVED_BY_CACHE = scoring._MIN_SAVED_BY_TREES = 0.0  # this benchmark measures them
    lines = [
        f"`python benchmarks/prompt_sharing.py {' '.join(sys.argv[1:])}`: milliseconds a step with the prompt twice, "
        f"and the other ways' ratio to it; median (range) of {args.repeats} turns, {args.pairs} pairs a batch, "
        f"float32. {cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            path = save_model(model, Path(folder))
            for mode in args.modes:
                policy = make_policy(path, mode)
                title = ["", f"## {model}, {mode}", "", "| shape | spared | twice, ms | cache | tree |"]
                lines += [*title, "|---|---:|---:|---:|---:|"]
                for shape in args.shapes:
                    lines.append(row(policy, shape, args))
                    print(lines[-1], file=sys.stderr, flush=True)
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
