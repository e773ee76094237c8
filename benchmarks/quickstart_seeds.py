"""The quickstart over several seeds: each draws other users, pairs and starting weights.

    python benchmarks/quickstart_seeds.py

Prints a Markdown table and, with `--out`, writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reporting import about, tell

_TEXT = ["--data.source.user_text", "true", "--model.user_model"]
CONFIGS = {
    "individual": ["--config", "configs/quickstart.yaml"],
    "cluster, K = 4": ["--config", "configs/quickstart_cluster.yaml"],
    # What a user says about themselves, alone and beside what they voted for.
    "text": ["--config", "configs/quickstart.yaml", *_TEXT, "TextUserModel"],
    "text and individual": [
        *["--config", "configs/quickstart.yaml", *_TEXT],
        '{"class_path": "CompositeUserModel", "init_args": {"parts": [{"class_path": "IndividualUserModel", '
        '"init_args": {"num_tokens": 16}}, {"class_path": "TextUserModel"}]}}',
    ],
}
ROWS = {
    "pair accuracy, seen users, of the noise ceiling": ("val/seen/accuracy", True),
    "pair accuracy, seen users": ("val/seen/accuracy", False),
    "the same pairs, generic user": ("val/seen/generic_accuracy", False),
    "pair accuracy, unseen users": ("val/unseen/accuracy", False),
    "well-formed answers": ("well_formed", False),
    "true utility of answers": ("utility", False),
}


def run(config: list[str], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Run the quickstart with a seed; return what it measured, with the seconds that it took."""
    command = [sys.executable, "-m", "prlhf_lightning", "fit", *config, "--seed_everything", str(seed)]
    command += ["--data.source.seed", str(seed), "--trainer.enable_progress_bar", "false"]
    start = time.perf_counter()
    subprocess.run([*command, "--trainer.default_root_dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    (path,) = folder.glob("version_*/comparison.json")
    return {**json.loads(path.read_text()), "run": {"seconds": time.perf_counter() - start}}


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Lay out mean and range over seeds: a column for each user model, and one for the vanilla model beside it."""
    columns = [(name, who) for name in results for who in ("personalized", "vanilla")]
    lines = ["| | " + " | ".join(f"{name}: {who}" for name, who in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, (key, relative) in ROWS.items():
        cells = []
        for name, who in columns:
            values = [r[who][key] / (r["best possible"][key] if relative else 1.0) for r in results[name]]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    seconds = {name: [r["run"]["seconds"] for r in runs] for name, runs in results.items()}
    cells = [f"{statistics.mean(seconds[name]):.0f}" if who == "personalized" else "" for name, who in columns]
    lines.append("| seconds for all: start, both trainings, comparison | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every configuration with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with OMP_NUM_THREADS=1, one a core")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart_seeds"), help="where the runs go")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (name, seed): pool.submit(
                run, CONFIGS[name], seed, args.folder / f"{name.replace(' ', '_')}-{seed}-{time.time_ns()}"
            )
            for name in args.configs
            for seed in args.seeds
        }
    results = {name: [runs[name, seed].result() for seed in args.seeds] for name in args.configs}
    text = f"Mean over seeds {', '.join(map(str, args.seeds))} (and range); {about()}.\n\n{table(results)}"
    tell(text, args.out)


if __name__ == "__main__":
    main()
