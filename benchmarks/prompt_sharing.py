"""When it pays to compute the prompt once for both completions of a pair.

    python benchmarks/prompt_sharing.py --out prompt_sharing.md

A step is forward and backward of the chosen and the rejected completion under a 20M-parameter Llama with LoRA, the
prompt computed once (its keys and values continued by both completions) or twice (two full rows). Both take turns, in
an order that alternates. `_WORTH_SHARING` in `prlhf_lightning/policies/scoring.py` is the share of spared positions
from which the first is quicker.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from reporting import tell
from transformers import AutoTokenizer, LlamaConfig

from prlhf_lightning.policies import CausalLMPolicy, LoRA, scoring
from prlhf_lightning.types import Tokens

SHAPES = ["1024x64", "512x100", "300x150", "200x200", "100x200", "100x400", "50x400"]
ASSETS = Path(__file__).parent.parent / "prlhf_lightning/assets"


def make_policy(layers: int, hidden_size: int) -> CausalLMPolicy:
    """Build a Llama of random weights with adapters of rank 16."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden_size, intermediate_size=8 * hidden_size // 3, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ASSETS / "byte-lm").save_pretrained(folder)
        policy = CausalLMPolicy(folder, lora=LoRA(rank=16, alpha=32), random_init=0)
        policy.build(with_reference=False)
        _ = policy.tokenizer  # which would be read when it is first used
    return policy.train()


def make_step(policy: CausalLMPolicy, prompt: Tokens, completions: list[Tokens], share: bool) -> Callable[[], None]:
    """Return one forward and backward, its way of computing the prompt forced."""

    def step() -> None:
        policy.shortcuts = replace(policy.shortcuts, shared_prompt=share)
        chosen, rejected = policy.log_probs(prompt, completions)
        torch.nn.functional.softplus(rejected.sum - chosen.sum).mean().backward()
        policy.zero_grad(set_to_none=True)

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Let the ways take turns; return milliseconds a step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            if turn:  # the first is warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def row(policy: CausalLMPolicy, shape: str, pairs: int, repeats: int) -> str:
    """Measure one shape; return its line of the table."""
    prompt_length, length = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)

    def block(width: int) -> Tokens:
        ids = torch.randint(3, 30000, (pairs, width), generator=generator)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    prompt, completions = block(prompt_length), [block(length), block(length)]
    times = measure(
        {name: make_step(policy, prompt, completions, name == "once") for name in ("once", "twice")}, repeats
    )
    ratios = [once / twice for once, twice in zip(times["once"], times["twice"], strict=True)]
    spared = prompt_length / (2 * (prompt_length + length))
    cells = [spread(times["once"], ".0f"), spread(times["twice"], ".0f"), spread(ratios, ".2f")]
    return f"| {prompt_length} | {length} | {spared:.2f} | {' | '.join(cells)} |"


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
    """Measure every shape, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens of the prompt x tokens of each completion")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=288)
    parser.add_argument("--out", type=Path, help="write the table to a file as well")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    scoring._WORTH_SHARING = 0.0  # what is to be found out
    policy = make_policy(args.layers, args.hidden_size)
    size = sum(param.numel() for param in policy.lm.parameters()) / 1e6
    lines = [
        f"Milliseconds a step, median (range) of {args.repeats}; {args.pairs} pairs, Llama of {size:.1f}M parameters "
        f"with LoRA, float32. {cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
        "| prompt | completion | positions spared | prompt once | prompt twice | once / twice |",
        "|---:|---:|---:|---:|---:|---:|",
        *(row(policy, shape, args.pairs, args.repeats) for shape in args.shapes),
    ]
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
