"""From JSONL to batches: time to be ready the first time and the second, and rows a second while training.

python benchmarks/data_pipeline.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

from lightning.fabric.utilities.seed import seed_everything
from reporting import tell

from prlhf_lightning.data import FileSource, PreferenceDataModule

ASSETS = Path(__file__).parent.parent / "prlhf_lightning/assets"
WORDS = [f"{a}{b}{c}" for a in "bdkmprst" for b in "aeiou" for c in "nlrst"]


def write(path: Path, rows: int) -> None:
    """Write rows by a long-tailed crowd: a twentieth as many users as rows, the first of them the most prolific."""
    draw = random.Random(0)
    users = max(1, rows // 20)
    with path.open("w") as file:
        for _ in range(rows):
            prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(8, 24))) for _ in range(3))
            user = f"user-{int(users * draw.random() ** 2)}"
            row = {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def ready(path: Path, folder: Path) -> tuple[PreferenceDataModule, float]:
    """Return a data module that is ready to train, and the seconds that took."""
    start = time.perf_counter()
    data = PreferenceDataModule(
        FileSource(train=str(path)), tokenizer=str(ASSETS / "byte-lm"), cache_dir=folder, batch_size=32
    )
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    return data, time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batches", type=int, default=2_000, help="training batches to time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        write(path, args.rows)
        _, first = ready(path, Path(folder) / "cache")
        data, second = ready(path, Path(folder) / "cache")
        start, rows = time.perf_counter(), 0
        for number, batch in enumerate(data.train_dataloader()):
            if number == args.batches:
                break
            rows += len(batch)
        rate = rows / (time.perf_counter() - start)
    lines = [
        f"`python benchmarks/data_pipeline.py --rows {args.rows}` on {os.cpu_count()} cores, {platform.machine()}.",
        "",
        "| rows | ready, first time | ready, second time | rows a second in training batches |",
        "|---:|---:|---:|---:|",
        f"| {args.rows:,} | {first:.1f} s | {second:.2f} s | {rate:,.0f} |",
    ]
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
