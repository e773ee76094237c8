"""What a few pairs of a new simulated user are worth to a model that reads users off their pairs.

    python -m prlhf_lightning fit --config configs/amortized.yaml
    python benchmarks/amortized.py --checkpoint runs/version_0/checkpoints/last.ckpt

The new users' tastes are drawn as those of the trained ones are. Their row is read off training pairs; accuracy is on
other pairs, on held-out prompts, and utility is over what is written for held-out prompts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from adapt import TESTED, Simulation

from prlhf_lightning.adaptation import Margins, encode_users, trained_rows
from prlhf_lightning.cli.models import load_module

COUNTS = (0, 1, 2, 5, 10, 20, 60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="of configs/amortized.yaml")
    parser.add_argument("--users", type=int, default=40, help="new ones")
    parser.add_argument("--trained", type=int, default=60, help="num_users of the configuration")
    args = parser.parse_args()
    model = load_module(args.checkpoint, "checkpoint").eval()
    world = Simulation(model, args.users, args.trained)
    new = [user.user_id for user in world.source.unseen_users]
    of_held_out = torch.arange(args.users).repeat_interleave(TESTED)
    margins_of = Margins(model, world.pairs(TESTED, "validation"))
    trained, generic = trained_rows(model)
    without, _ = world.utilities(new, generic.repeat(args.users, 1))
    print("| pairs | pair accuracy | utility | lowest of a user | well-formed | gain in utility (95%) | ms a user |")
    print("|---" * 7 + "|")
    for count in COUNTS:
        pairs = world.pairs(count) if count else None
        start = time.perf_counter()
        rows = generic.repeat(args.users, 1) if pairs is None else encode_users(model, pairs, new).rows
        took = (time.perf_counter() - start) / args.users * 1e3
        accuracy = (margins_of(rows, of_held_out) > 0).float().mean()
        utility, well_formed = world.utilities(new, rows)
        gain = utility - without
        print(
            f"| {count} | {accuracy:.3f} | {utility.mean():.3f} | {utility.min():.3f} | {well_formed:.3f} | "
            f"{gain.mean():+.3f} ± {1.96 * gain.std() / args.users**0.5:.3f} | {took:.2f} |",
            flush=True,
        )
    seen, _ = world.utilities([user.user_id for user in world.source.seen_users], trained)
    print(f"\nTrained users, by the {model.user_model.history_size} pairs that are kept of each: {seen.mean():.3f}.")


if __name__ == "__main__":
    main()
