"""Where the time of a step goes, by kind of operation, for our P-DPO and the authors' scheme.

    python benchmarks/profile_step.py                    # the shape at which we gain least, 20M parameters, LoRA
    python benchmarks/profile_step.py --shape 0 --model 125m

Self times of torch's operations, as its profiler gives them, added up by what they do. Operations on as many columns as
the vocabulary has are the LM head's: its product, the softmax and its gradient.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import transformers
from contenders import MODELS, contenders, environment, make_batch, save_model, size_of
from reporting import tell
from step_time import SHAPES
from torch.profiler import ProfilerActivity, profile

CONTENDERS = ["authors' P-DPO scheme", "our P-DPO, cached reference", "our P-DPO, cached reference, sample_terms"]
KINDS = {
    "attention": ("attention",),
    "products of the layers and adapters": ("::mm", "::addmm", "::bmm"),
    "copies and padding": ("copy", "cat", "index", "fill", "slice", "zero"),
}


def kind_of(name: str, shapes: list[list[int]], vocab_size: int) -> str:
    """Return what an operation is counted as."""
    if any(vocab_size in shape for shape in shapes if isinstance(shape, list)):
        return "LM head and log-softmax"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


def main() -> None:
    """Profile each contender and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="20m", choices=MODELS)
    parser.add_argument("--shape", type=int, default=3, choices=range(len(SHAPES)))
    parser.add_argument("--mode", default="lora", choices=["lora", "full"])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/profile_step.md"))
    args = parser.parse_args()
    args.device = "cpu"
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    times: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(args.model, Path(folder))
        makers = contenders(path, make_batch(SHAPES[args.shape], args.pairs, args.device), args, args.mode == "lora")
        for name in CONTENDERS:
            step = makers[name]()
            step()  # warm-up
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                for _ in range(args.repeats):
                    step()
            times[name] = Counter()
            for event in profiler.key_averages(group_by_input_shape=True):
                kind = kind_of(event.key, event.input_shapes, MODELS[args.model]["vocab_size"])
                times[name][kind] += event.self_cpu_time_total / 1e3 / args.repeats
    kinds = sorted({kind for each in times.values() for kind in each}, key=lambda kind: -times[CONTENDERS[0]][kind])
    lines = [
        "# Where the time of a step goes",
        "",
        f"`python benchmarks/profile_step.py {' '.join(sys.argv[1:])}` on {environment(args)}; {args.model}, "
        f"{args.mode}, prompt/chosen/rejected {'/'.join(map(str, SHAPES[args.shape]))}, {size_of(args)}, "
        f"mean of {args.repeats} steps.",
        "",
        "Milliseconds a step, self time, summed over threads that call operations.",
        "",
        "| | " + " | ".join(CONTENDERS) + " |",
        "|---|" + "---:|" * len(CONTENDERS),
        *(f"| {kind} | " + " | ".join(f"{times[name][kind]:.0f}" for name in CONTENDERS) + " |" for kind in kinds),
        "| together | " + " | ".join(f"{sum(times[name].values()):.0f}" for name in CONTENDERS) + " |",
        "",
    ]
    tell("\n".join(lines), args.output)


if __name__ == "__main__":
    main()
