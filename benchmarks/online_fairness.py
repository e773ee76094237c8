"""Utility of a majority and of a minority with opposed preferences, after online RL: with soft prompts and without.

    python benchmarks/online_fairness.py

Nine of ten users belong to one group, the others to the opposite one; no text suits both. The reward is the users' true
utility: 1 is the best text for a user, 0 the mean over all styles. Each seed draws other users, prompts and starting
weights. `plain GRPO` is one policy for all users, with neither soft prompt nor user. Words after `--` are options of
`fit` for all contenders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import about, tell

from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data import SimulatedSource
from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.simulation.users import best_common_utility

CONFIG = "configs/online.yaml"
SHARES = [9.0, 1.0]
NUM_USERS = 20
GRPO = ["--model.loss", "GRPOLoss", "--model.advantages", "group"]
UNIFORM = ["--model.user_model", json.dumps({"class_path": "prlhf_lightning.user_models.UniformUserModel"})]
CONTENDERS = {"OnlineRL, a soft prompt for each user": [], "plain GRPO, one policy for all": [*UNIFORM, *GRPO]}
ROWS = ("majority", "minority", "gap", "well-formed")


def make_source(seed: int) -> SimulatedSource:
    """Return the users of a seed."""
    return SimulatedSource(num_users=NUM_USERS, groups=2, group_shares=SHARES, seed=seed)


def run(seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """Train with a seed; return what each group thinks of greedy answers to all held-out prompts."""
    data = {"groups": 2, "group_shares": json.dumps(SHARES), "seed": seed, "num_unseen_users": 0}
    command = [sys.executable, "-m", "prlhf_lightning", "fit", "--config", CONFIG, "--seed_everything", str(seed)]
    command += [f"--data.source.init_args.{name}={value}" for name, value in data.items()]
    command += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return judged(make_source(seed), folder)


def judged(source: SimulatedSource, folder: Path) -> dict[str, float]:
    """Return each group's mean utility, the gap, and the share of well-formed answers."""
    writer = open_writer(folder / "version_0")
    rows = [(user, prompt) for user in source.seen_users for prompt in source.eval_prompts()]
    requests = [GenerationRequest(prompt, user.user_id, max_new_tokens=40, temperature=0) for user, prompt in rows]
    verdicts = [
        source.judge(user.user_id, prompt, answer.text)
        for (user, prompt), answer in zip(rows, writer.generate(requests), strict=True)
    ]
    majority, minority = (
        statistics.mean(
            verdict.utility for (user, _), verdict in zip(rows, verdicts, strict=True) if user.group == group
        )
        for group in (0, 1)
    )
    well_formed = statistics.mean(verdict.well_formed for verdict in verdicts)
    return {"majority": majority, "minority": minority, "gap": majority - minority, "well-formed": well_formed}


def main() -> None:
    """Run every contender with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/online_fairness"), help="where the runs go")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="options of fit, after --")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for done, seed in enumerate(args.seeds, start=1):
        for name, options in CONTENDERS.items():
            folder = args.folder / f"{seed}-{time.time_ns()}"
            found[name].append(run(seed, folder, [*options, *args.options]))
        tell(table(found, args.seeds[:done]), args.out)


def table(found: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    """Return the table of the seeds so far: means, and each seed in parentheses."""
    lines = [f"{about()}; {NUM_USERS} users.", "", f"| | {' | '.join(ROWS)} |", "|---|" + "---:|" * len(ROWS)]
    for name, results in found.items():
        columns = [[result[row] for result in results] for row in ROWS]
        cells = [
            f"{statistics.mean(values):.3f}" + (f" ({', '.join(f'{v:.3f}' for v in values)})" if len(seeds) > 1 else "")
            for values in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    common = [f"{best_common_utility(make_source(seed).seen_users):.3f}" for seed in seeds]
    lines += ["", f"Highest mean utility over users that one style can reach, by seed: {', '.join(common)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
