"""How the strength of a user moves what is written: true utility of the quickstart's answers at several strengths.

    python -m prlhf_lightning fit --config configs/quickstart.yaml --train_baseline false
    python benchmarks/strength.py --model runs/version_0/checkpoints/last.ckpt

Every simulated user who was seen in training judges an answer to every held-out prompt: the likeliest, or one drawn.
The intervals are 95% bootstrap intervals over users, paired where strengths are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from random import Random

from reporting import about, tell

from prlhf_lightning import Generation, SimulatedSource
from prlhf_lightning.cli.models import open_writer

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_DRAWS = 10_000


def interval(values: list[float], rng: Random) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean over users."""
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
    return means[int(0.025 * _DRAWS)], means[int(0.975 * _DRAWS)]


def main() -> None:
    """Write at every strength, judge, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of the quickstart, or its export")
    parser.add_argument("--source-seed", type=int, default=0, help="data.source.seed of the run")
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0, answers are drawn, seeded")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = SimulatedSource(num_users=20, seed=args.source_seed)
    writer = open_writer(args.model)
    users, prompts, rng = [user.user_id for user in source.seen_users], source.eval_prompts(), Random(0)
    head = ["strength", "true utility (95%)", "gain over the strength before (95%)", "users who gain", "well-formed"]
    lines = [
        "| " + " | ".join([*head, "utility of those"]) + " |",
        "|---|---|---|---|---|---|",
    ]
    before: list[float] = []
    start = time.perf_counter()
    for strength in args.strengths:
        asked = [(user, prompt) for user in users for prompt in prompts]
        written = writer.generate(
            [
                Generation(prompt, user, "", strength, 40, args.temperature, seed=seed)
                for seed, (user, prompt) in enumerate(asked)
            ],
            progress=True,
        )
        verdicts = [source.judge(*request, one.text) for request, one in zip(asked, written, strict=True)]
        each = [verdicts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(users))]
        utility = [statistics.fmean(verdict.utility for verdict in of_user) for of_user in each]
        formed = [verdict.utility for verdict in verdicts if verdict.well_formed]
        low, high = interval(utility, rng)
        cells = [f"{strength:g}", f"{statistics.fmean(utility):+.3f} ({low:+.3f} to {high:+.3f})", "", ""]
        if before:
            gains = [now - then for now, then in zip(utility, before, strict=True)]
            low, high = interval(gains, rng)
            cells[2:] = [
                f"{statistics.fmean(gains):+.3f} ({low:+.3f} to {high:+.3f})",
                f"{sum(g > 0 for g in gains)}/{len(gains)}",
            ]
        before = utility
        cells += [f"{len(formed) / len(verdicts):.3f}", f"{statistics.fmean(formed):+.3f}" if formed else ""]
        lines.append("| " + " | ".join(cells) + " |")
    text = (
        f"{len(users)} users, {len(prompts)} held-out prompts each, temperature {args.temperature:g}; {about()}; "
        f"{time.perf_counter() - start:.0f} s.\n\n" + "\n".join(lines)
    )
    tell(text, args.out)


if __name__ == "__main__":
    main()
