"""Online RL from the small supervised model, with the simulated users' true utility as reward, over several seeds.

    python benchmarks/online_rl.py

Each seed draws other users, prompts and starting weights. The trained models answer all held-out prompts for all users,
and the users judge the answers. Prints a Markdown table and, with `--out`, writes it to a file. Words after `--` are
options of `fit`, such as `--model.optim.lr 5e-4`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import about, tell

from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data import SimulatedSource
from prlhf_lightning.inference import GenerationRequest

CONFIG = "configs/online.yaml"
NUM_USERS = 20  # as in the configuration
ROWS = ("utility, greedy answers", "utility, sampled answers", "utility, worst tenth of users", "well-formed, greedy")
ROWS += ("well-formed, sampled", "utility, generic user", "CPU seconds", "seconds")


def run(seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """Train with a seed; return what the users think of the answers, and the time of the whole command."""
    command = [sys.executable, "-m", "prlhf_lightning", "fit", "--config", CONFIG, "--seed_everything", str(seed)]
    command += ["--data.source.init_args.seed", str(seed), "--trainer.enable_progress_bar", "false", *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--trainer.default_root_dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**judged(seed, folder), "CPU seconds": cpu, "seconds": seconds}


def judged(seed: int, folder: Path) -> dict[str, float]:
    """Return utility and well-formedness of the answers to all held-out prompts."""
    source = SimulatedSource(num_users=NUM_USERS, seed=seed)
    writer = open_writer(folder / "version_0")
    rows = [(user.user_id, prompt) for user in source.seen_users for prompt in source.eval_prompts()]
    found: dict[str, float] = {}
    for name, user_of, temperature in (("greedy", str, 0.0), ("sampled", str, 1.0), ("generic", None, 0.0)):
        answers = writer.generate(
            [
                GenerationRequest(prompt, user_of and user, max_new_tokens=40, temperature=temperature, seed=number)
                for number, (user, prompt) in enumerate(rows)
            ]
        )
        verdicts = [source.judge(*row, answer.text) for row, answer in zip(rows, answers, strict=True)]
        utility = [verdict.utility for verdict in verdicts]
        if name == "generic":
            found["utility, generic user"] = statistics.mean(utility)
            continue
        found[f"utility, {name} answers"] = statistics.mean(utility)
        found[f"well-formed, {name}"] = statistics.mean(verdict.well_formed for verdict in verdicts)
        if name == "greedy":
            size = len(rows) // NUM_USERS
            by_user = sorted(statistics.mean(utility[n * size : (n + 1) * size]) for n in range(NUM_USERS))
            found["utility, worst tenth of users"] = statistics.mean(by_user[: NUM_USERS // 10])
    return found


def main() -> None:
    """Run every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/online_rl"), help="where the runs go")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="options of fit, after --")
    args = parser.parse_args()
    results = [run(seed, args.folder / f"{seed}-{time.time_ns()}", args.options) for seed in args.seeds]
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |",
        "|---" * (len(results) + 2) + "|",
    ]
    for name in ROWS:
        digits = 0 if "seconds" in name else 3
        values = [result[name] for result in results]
        cells = [f"{value:.{digits}f}" for value in (*values, statistics.mean(values))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    tell(f"{CONFIG} {' '.join(args.options)}; {about()}.\n\n" + "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
