"""Runs every command that writes on a disk that fills up, at one point after another, and looks at what is left.

    OMP_NUM_THREADS=1 python benchmarks/full_disk.py                    # about an hour; sizes need root on Linux
    OMP_NUM_THREADS=1 python benchmarks/full_disk.py --only export "data convert" --points 10

A disk fills up in two ways. *size*: the files are on a disk in memory (tmpfs) that has room for a part of what the
command writes, so that any write of any library may fail. *call*: the n-th time that Python opens a file to write,
makes a folder or renames on that disk, the system refuses (`No space left on device`); this needs no rights.

After each try: the exit status is not 0, and one line, without a stack trace, names a file and the reason; each file
that was there before is there, byte for byte; each file that is new is whole (rows, checkpoints, JSON, YAML; a folder
has all of its files); no file of an unfinished writing is left; and once there is room, the same command succeeds. A
command may also have done without what was refused: then all of its files are there. Where only caches are on the full
disk, the run succeeds at once, with a warning.

Each try is a fork of this process, which has imported all that takes long.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
import yaml

import prlhf_lightning.cli.adapt
import prlhf_lightning.cli.export
import prlhf_lightning.cli.fit  # noqa: F401
from prlhf_lightning.cli.main import main
from prlhf_lightning.simulation.blank_model import vocabulary
from prlhf_lightning.training import checkpoint_files

ROOM = 96 << 20  # bytes; enough for every command
PAGE = 4096
FIT = [
    "fit",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=2",
    "--checkpoint.every_n_train_steps=1",
    "--collapse.prompts=0",
    "--model.user_model=IndividualUserModel",
    "--model.user_model.num_tokens=2",
    "--model.policy=CausalLMPolicy",
    "--model.policy.model=builtin:style-lm",
    "--model.policy.lora.rank=2",
    "--model.loss=DPOLoss",
    "--model.sampling.max_new_tokens=4",
    "--data.batch_size=4",
    "--data.validation_fraction=0.2",
]


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        words: Its words; `{base}` is a folder with a trained run, `{disk}` the disk that fills up.
        before: Files of `{base}` that are on the disk already, and that the command replaces, by their names there.
        folders: Folders that are there as a whole, or not at all.
        is_cache: Whether only caches are on the disk.
        again: What is added to the words to go on once there is room.
        earlier: Words of a command that is run first, and whose files must outlast the one that fails.
    """

    words: list[str]
    before: dict[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    is_cache: bool = False
    again: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


LAST = "{base}/runs/version_0/checkpoints/last.ckpt"
DATA = ["--data.source=FileSource", "--data.source.train={base}/votes.jsonl"]
RUNS = "--trainer.default_root_dir={disk}/runs"
EXPORT = ["export", "--model", LAST, "--output", "{disk}/model"]
CASES = {
    "fit": Case([*FIT, *DATA, RUNS], again=("--ckpt_path=last",)),
    "fit, TensorBoard": Case(
        [*FIT, *DATA, RUNS, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir={disk}/runs"],
        again=("--ckpt_path=last",),
    ),
    "fit, with a baseline": Case([*FIT, *DATA, RUNS, "--train_baseline=true"]),
    "fit, caches": Case([*FIT, *DATA, "--trainer.default_root_dir={base}/other"], is_cache=True),
    "fit, a stream's caches": Case(
        [*FIT, *DATA, "--trainer.default_root_dir={base}/other", "--data.streaming=true",
         "--data.validation_fraction=0", "--data.max_prompt_length=60", "--data.max_completion_length=60"],
        is_cache=True,
    ),
    "validate": Case(["validate", *FIT[2:], *DATA, RUNS, "--ckpt_path", LAST]),
    "predict": Case(["predict", *FIT[2:], *DATA, RUNS, "--ckpt_path", LAST]),
    "export": Case([*EXPORT, "--prompt_embeds=true", "--peft_users=true"], folders=("model",)),
    "export, over an older one": Case(
        [*EXPORT, "--prompt_embeds=true"], folders=("model",), earlier=("--user_vectors=false",)
    ),
    "export, adapters": Case([*EXPORT, "--adapters=true"], folders=("model",)),
    "generate": Case(
        ["generate", "--model", LAST, "--prompts", "{base}/prompts.jsonl", "--max_new_tokens=4", "--output",
         "{disk}/answers.jsonl"],
        before={"answers.jsonl": "prompts.jsonl"},
    ),
    "adapt": Case(
        ["adapt", "--model", LAST, "--feedback", "{base}/new.jsonl", "--output", "{disk}/adapted.ckpt"],
        before={"adapted.ckpt": "runs/version_0/checkpoints/last.ckpt"},
    ),
    "shrink": Case(["shrink", "--model", LAST, "--output", "{disk}/shrunk.ckpt"]),
    "relocate": Case(
        ["relocate", "--model", LAST, "--base", "builtin:style-lm", "--output", "{disk}/moved.ckpt"],
        before={"moved.ckpt": "runs/version_0/checkpoints/last.ckpt"},
    ),
    "users add": Case(
        ["users", "add", "--model", "{disk}/a.ckpt", "--user", "zoe"],
        before={"a.ckpt": "runs/version_0/checkpoints/last.ckpt"},
    ),
    "users remove": Case(
        ["users", "remove", "--model", "{disk}/a.ckpt", "--user", "ann"],
        before={"a.ckpt": "runs/version_0/checkpoints/last.ckpt"},
    ),
    "users export": Case(["users", "export", "--model", LAST, "--output", "{disk}/vectors"], folders=("vectors",)),
    "report": Case(
        ["report", "--model", LAST, "--output", "{disk}/page.html", "--num_users=2", "--num_prompts=1",
         "--max_new_tokens=4"],
        before={"page.html": "prompts.jsonl", "page.json": "prompts.jsonl"},
    ),
    "data describe": Case(["data", "describe", "--train", "{base}/votes.jsonl", "--output", "{disk}/page.html"]),
    "data check": Case(["data", "check", "--train", "{base}/votes.jsonl", "--output", "{disk}/check.json"]),
    "data convert": Case(
        ["data", "convert", "--train", "{base}/votes.jsonl", "--validation", "{base}/new.jsonl", "--on_error=report",
         "--overwrite=true", "--output", "{disk}/parquet"],
        before={"parquet/train.parquet": "prompts.jsonl", "parquet/validation.parquet": "prompts.jsonl"},
    ),
    "data convert, a new folder": Case(
        ["data", "convert", "--train", "{base}/votes.jsonl", "--output", "{disk}/parquet"], folders=("parquet",)
    ),
    "api-key": Case(["api-key", "--name=second", "--keys={disk}/keys.toml"], before={"keys.toml": "keys.toml"}),
}  # fmt: skip


def write_inputs(base: Path) -> None:
    """Write votes, prompts and keys."""
    draw = random.Random(0)
    words = [word for word in vocabulary() if word.isalpha()]

    def votes(path: Path, users: list[str], each: int) -> None:
        with path.open("w") as file:
            for user in users * each:
                long, short, prompt = (" ".join(draw.choices(words, k=k)) for k in (8, 3, 4))
                file.write(json.dumps({"user_id": user, "prompt": prompt, "chosen": long, "rejected": short}) + "\n")

    votes(base / "votes.jsonl", ["ann", "bob", "cy", "dee"], 8)
    votes(base / "new.jsonl", ["eve", "fay"], 4)
    (base / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tell me {n}"}) + "\n" for n in range(300)))
    (base / "keys.toml").write_text(f'[first]\nsha256 = "{"0" * 64}"\nusers = "*"\n')


def run(words: list[str], cache: Path, log: Path, refuse: Callable[[], None] | None = None) -> int:
    """Run a command in a fork; return its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: object = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["PRLHF_CACHE"] = str(cache)
        sys.argv = ["prlhf_lightning"]
        if refuse is not None:
            refuse()
        main(words)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


class Calls:
    """Counts the times that Python opens, makes or renames something on a disk, and refuses one of them."""

    def __init__(self, disk: Path, at: int, count: Path) -> None:
        self.disk, self.at, self.count, self.number = f"{disk}{os.sep}", at, count, 0

    def __call__(self) -> None:
        """Begin."""
        sys.addaudithook(self._look)

    def _look(self, event: str, values: tuple[object, ...]) -> None:
        is_write = event in ("os.mkdir", "os.rename") or (
            event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if is_write and str(values[0]).startswith(self.disk):
            self.number += 1
            if not self.at:
                self.count.write_text(str(self.number))
            if self.number == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(values[0]))


class Disk:
    """A disk in memory, of which the room can be changed; or, without the rights, a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path)]
        self.is_mounted = not subprocess.run(options, capture_output=True, check=False).returncode

    def resize(self, size: int) -> None:
        """Give it room for so many bytes in all."""
        if self.is_mounted:
            subprocess.run(["mount", "-o", f"remount,size={max(PAGE, size)}", str(self.path)], check=True)

    def used(self) -> int:
        """Return the bytes that are taken."""
        room = os.statvfs(self.path)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    def clear(self) -> None:
        """Remove all files, and give it room."""
        self.resize(ROOM)
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Give it back."""
        if self.is_mounted:
            subprocess.run(["umount", str(self.path)], check=True)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(path: Path) -> str:
    """Return what of a file is not whole."""
    name, raw = path.name, path.read_bytes()
    try:
        if path.suffix == ".ckpt":
            checkpoint_files.check(path)
        elif path.suffix == ".jsonl":
            assert raw.endswith(b"\n") or not raw, "the last row is cut off"
            [json.loads(line) for line in raw.splitlines()]
        elif path.suffix == ".csv":
            rows = list(csv.reader(raw.decode().splitlines()))
            assert raw.endswith(b"\n"), "the last row is cut off"
            assert len({len(row) for row in rows}) == 1, "rows differ in length"
        elif path.suffix == ".json":
            json.loads(raw)
        elif path.suffix == ".yaml":
            assert raw, "it is empty"
            yaml.safe_load(raw)
        elif path.suffix == ".html":
            assert raw.rstrip().endswith(b"</html>"), "its end is missing"
        elif path.suffix == ".parquet":
            assert raw.endswith(b"PAR1"), "its end is missing"
        elif name.startswith(".") or ".partial" in name:
            assert name == "predictions.partial.jsonl", "it is left from an unfinished writing"
    except Exception as error:
        return f"{path}: {error}"
    return ""


def wrong(case: Case, disk: Path, code: int, said: str, before: dict[str, str], full: dict[str, str]) -> Iterator[str]:
    """Yield what is not as it should be after a try."""
    if "Traceback" in said:
        yield "trace: " + said.strip().splitlines()[-1]
    if case.is_cache:
        if code:
            yield f"exit status {code}: " + said.strip().splitlines()[-1]
        return
    after = digests(disk)
    if not code:
        missing = sorted(full.keys() - after.keys())
        yield from [f"exit status 0, but there is no {', '.join(missing)}"] if missing else []
        yield from (f"exit status 0, but half: {found}" for name in after if (found := damage(disk / name)))
        return
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(lines) != 1 or "No space left on device" not in lines[0] or str(disk) not in lines[0]:
        yield f"no line with file and reason: {lines or said.strip().splitlines()[-1:]}"
    for name, digest in before.items():
        if after.get(name) != digest:
            yield f"lost or changed: {name}"
    new = [name for name in after if name not in before]
    yield from (f"half: {found}" for name in new if (found := damage(disk / name)))
    for folder in case.folders:
        there = {name for name in after if name.startswith(f"{folder}/")}
        old = {name for name in before if name.startswith(f"{folder}/")}
        if there != old and (not old or there - old):
            yield f"half a folder: {sorted(there - old)}"
        if (disk / folder).exists() and not old:
            yield f"an empty folder is left: {folder}"


def tries(case: Case, disk: Disk, base: Path, points: int, ways: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Run a command until each point; yield the way, the point, and what was wrong."""
    log, count = base / "log.txt", base / "count"
    cache = disk.path / "cache" if case.is_cache else base / "cache"
    words = [word.format(base=base, disk=disk.path) for word in case.words]

    def prepare() -> dict[str, str]:
        disk.clear()
        shutil.rmtree(base / "other", ignore_errors=True)
        for name, source in case.before.items():
            (disk.path / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(base / source, disk.path / name)
        if case.earlier and run([*words[:5], *case.earlier], cache, log):
            sys.exit(log.read_text())
        return digests(disk.path)

    def attempt(way: str, at: int) -> list[str]:
        before = prepare()
        if way == "size":
            disk.resize(disk.used() + at)
        refuse = Calls(disk.path, at, count) if way == "call" else None
        code = run(words, cache, log, refuse)
        said = log.read_text()
        disk.resize(ROOM)
        found = list(wrong(case, disk.path, code, said, before, full))
        if not case.is_cache and code:
            go_on = "last.ckpt" in str(digests(disk.path)) or not case.again
            if run([*words, *(case.again if go_on else ())], cache, log):
                found.append(f"again: {log.read_text().strip().splitlines()[-1]}")
            else:
                found += [
                    f"again: half: {said}" for path in disk.path.rglob("*") if path.is_file() and (said := damage(path))
                ]
        return found

    prepare()
    start, (peak) = disk.used(), 0
    count.write_text("0")
    if run(words, cache, log, Calls(disk.path, 0, count)):
        sys.exit(f"{words}: {log.read_text()}")
    calls, peak, full = int(count.read_text()), disk.used() - start, digests(disk.path)
    if "call" in ways:
        for at in spread(1, calls, points):
            yield "call", at, attempt("call", at)
    if "size" in ways and disk.is_mounted:
        # A file that replaces another needs room beside it, so that there may be less left at the end than at the peak.
        for at in spread(0, max(1, peak // PAGE - 1), points):
            yield "size", at * PAGE, attempt("size", at * PAGE)


def spread(first: int, last: int, points: int) -> list[int]:
    """Return so many numbers from the first to the last."""
    steps = max(1, points - 1)
    return sorted({first + round(n * (last - first) / steps) for n in range(points)})


def measure(names: list[str], points: int, ways: list[str], base: Path, disk: Disk) -> int:
    """Try commands; print a table, and what was wrong; return how many tries were."""
    write_inputs(base)
    first = [word.format(base=base, disk=base) for word in [*FIT, *DATA, RUNS]]
    needs_run = any("runs" in part for name in names for part in (*CASES[name].words, *CASES[name].before.values()))
    if needs_run and run(first, base / "cache", base / "log.txt"):
        sys.exit((base / "log.txt").read_text())
    print("| command | refused calls | disk sizes | not as it should be |\n|---|---|---|---|")
    bad = 0
    for name in names:
        done: Counter[str] = Counter()
        mistakes: Counter[str] = Counter()
        for way, at, found in tries(CASES[name], disk, base, points, ways):
            done[way] += 1
            bad += bool(found)
            mistakes.update(f"{way} {at}: {one}" for one in found)
        print(f"| {name} | {done['call']} | {done['size']} | {len(mistakes)} |", flush=True)
        for mistake in mistakes:
            print(f"    {mistake}", file=sys.stderr, flush=True)
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--points", type=int, default=20, help="of each way and command")
    parser.add_argument("--ways", nargs="*", choices=["call", "size"], default=["call", "size"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        (root / "base").mkdir()
        disk = Disk(root / "disk")
        try:
            failed = measure(arguments.only, arguments.points, arguments.ways, root / "base", disk)
        finally:
            disk.close()
    sys.exit(bool(failed))
