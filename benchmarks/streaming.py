"""Streamed rows: the time and memory of counting the users and of an epoch's batches, as it goes on.

TOKENIZERS_PARALLELISM=false python benchmarks/streaming.py --rows 10000000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
POINTS = 10  # at which the epoch is looked at
_MIB = 1 << 20


def write(path: Path, rows: int, users: int) -> None:
    """Write rows by a long-tailed crowd. No two texts are alike, so that each has to be tokenized."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(100_000)]
    with path.open("w", buffering=_MIB) as file:
        for number in range(rows):
            prompt, chosen, rejected = (sentences[int(draw.random() * len(sentences))] for _ in range(3))
            row = {
                "user_id": f"user-{int(users * draw.random() ** 2)}",
                "prompt": f"{number} {prompt}",
                "chosen": f"{number} {chosen}",
                "rejected": f"{number} again {rejected}",
            }
            file.write(json.dumps(row) + "\n")


def memory(field: str) -> float:
    """Return this process's memory in MiB: `VmRSS` now, `VmHWM` at its peak (which `reset_peak` begins anew)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def reset_peak() -> None:
    """Begin a new peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")


def epoch(data: PreferenceDataModule) -> tuple[list[str], float]:
    """Go through an epoch's batches; return lines of the table, and the mean number of tokens of a row."""
    lines: list[str] = []
    rows = since = tokens = counted = 0
    every = len(data.train_dataloader()) // POINTS
    start = time.perf_counter()
    reset_peak()
    for number, batch in enumerate(data.train_dataloader(), start=1):
        rows, since = rows + len(batch), since + len(batch)
        if number % 1000 == 1:
            tokens += sum(int(part.mask.sum()) for part in (batch.prompt, batch.chosen, batch.rejected))
            counted += len(batch)
        if number % every == 0:
            rate = since / (time.perf_counter() - start)
            lines.append(f"| {rows:,} | {rate:,.0f} | {memory('VmRSS'):,.0f} | {memory('VmHWM'):,.0f} |")
            print(lines[-1], flush=True)
            reset_peak()
            since, start = 0, time.perf_counter()
    return lines, tokens / counted


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        writer = multiprocessing.Process(target=write, args=(path, args.rows, args.users))  # with memory of its own
        writer.start()
        writer.join()
        size = path.stat().st_size
        data = PreferenceDataModule(
            FileSource(train=str(path)),
            tokenizer=str(ASSETS / "byte-lm"),
            cache_dir=Path(folder) / "cache",
            batch_size=32,
            pairs_per_user=4,
            bucket_by_length=True,
            streaming=True,
        )
        before, start = memory("VmRSS"), time.perf_counter()
        data.prepare_data()
        data.setup("fit")
        counted = time.perf_counter() - start
        counting = memory("VmHWM")
        lines, tokens = epoch(data)
    text = "\n".join(
        [
            f"`TOKENIZERS_PARALLELISM=false python benchmarks/streaming.py --rows {args.rows}` on one of "
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; no loader workers.",
            "",
            f"The file has {size / 1e9:.2f} GB; a row has {tokens:.0f} tokens on average, and no two texts are alike. "
            f"Before the data are touched the process has {before:,.0f} MiB.",
            "",
            f"Counting {args.rows:,} rows of {data.num_users - 1:,} users: {counted:.0f} s "
            f"({args.rows / counted:,.0f} rows a second), peak {counting:,.0f} MiB.",
            "",
            "| rows trained on | rows a second since the line above | memory now, MiB | its peak since, MiB |",
            "|---:|---:|---:|---:|",
            *lines,
        ]
    )
    tell(text, args.out)


if __name__ == "__main__":
    main()
