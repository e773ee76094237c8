"""Damages a checkpoint in a thousand ways and counts what becomes of each when it is loaded.

    python benchmarks/fuzz_checkpoint.py                          # 1,000 damaged files
    python benchmarks/fuzz_checkpoint.py --checkpoint last.ckpt   # of a checkpoint of yours, which is left alone

Each is loaded as training resumes from it. It is *detected* if that is an error that names the file, *harmless* if
every value that comes back is the one that was saved, and *silent* if another value comes back. Crafted pickles would
leave a file behind if their code ran, also those with a checksum that is right.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning.errors import DamagedCheckpointError
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpointing import ChecksummedCheckpointIO

PAGE = 4096


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


# Each takes the bytes of the file and chance, and returns other bytes.


def flip_bits(raw: bytes, draw: random.Random) -> bytes:
    """Turn over one bit to eight, anywhere."""
    damaged = bytearray(raw)
    for place in draw.sample(range(len(raw)), draw.choice((1, 1, 1, 2, 8))):
        damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def flip_at_end(raw: bytes, draw: random.Random) -> bytes:
    """Turn over a bit of the last 200 bytes, where the directory of the zip file ends and the seal stands."""
    damaged = bytearray(raw)
    damaged[-draw.randint(1, 200)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncate(raw: bytes, draw: random.Random) -> bytes:
    """Cut the file off, anywhere or within the last 200 bytes."""
    return raw[: draw.choice((draw.randrange(len(raw)), len(raw) - draw.randint(1, 200)))]


def cut_out(raw: bytes, draw: random.Random) -> bytes:
    """Leave out some bytes in the middle."""
    start = draw.randrange(len(raw))
    return raw[:start] + raw[start + draw.randint(1, PAGE) :]


def zero_page(raw: bytes, draw: random.Random) -> bytes:
    """Fill a page with zeros, as a file system may after a loss of power."""
    start = draw.randrange(0, len(raw), PAGE)
    return raw[:start] + bytes(min(PAGE, len(raw) - start)) + raw[start + PAGE :]


def zero_from(raw: bytes, draw: random.Random) -> bytes:
    """Fill all from some page on with zeros."""
    start = draw.randrange(0, len(raw), PAGE)
    return raw[:start] + bytes(len(raw) - start)


def swap_pages(raw: bytes, draw: random.Random) -> bytes:
    """Exchange two pages."""
    a, b = sorted(draw.sample(range(len(raw) // PAGE), 2))
    page = [raw[n * PAGE : (n + 1) * PAGE] for n in (a, b)]
    return raw[: a * PAGE] + page[1] + raw[(a + 1) * PAGE : b * PAGE] + page[0] + raw[(b + 1) * PAGE :]


def append(raw: bytes, draw: random.Random) -> bytes:
    """Write something after the end."""
    return raw + draw.randbytes(draw.randint(1, PAGE))


def garbage(raw: bytes, draw: random.Random) -> bytes:
    """Replace the file by chance, with the first bytes of a zip file or without."""
    return raw[: draw.choice((0, 0, 4, 30))] + draw.randbytes(draw.randrange(2 * PAGE))


def swap_members(raw: bytes, draw: random.Random) -> bytes:
    """Exchange the contents of two members of the same size within the file, checksums and all, but for the seal."""
    members = zipfile.ZipFile(io.BytesIO(raw)).infolist()
    by_size: dict[int, list[zipfile.ZipInfo]] = {}
    for member in members:
        by_size.setdefault(member.file_size, []).append(member)
    pairs = [group for group in by_size.values() if len(group) > 1 and group[0].file_size > 3]
    a, b = draw.sample(draw.choice(pairs), 2)
    damaged = bytearray(raw)
    starts = [_data_start(raw, member) for member in (a, b)]
    for start, other in zip(starts, reversed(starts), strict=True):
        damaged[start : start + a.file_size] = raw[other : other + a.file_size]
    if damaged == raw:  # both were the same, as two tables of zeros are
        damaged[starts[0]] ^= 1
    return bytes(damaged)


def swap_seal(raw: bytes, draw: random.Random) -> bytes:
    """Give the file the seal of another."""
    return raw[:-64] + draw.randbytes(32).hex().encode()


_LOAD = ChecksummedCheckpointIO().load_checkpoint


class _Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.proof}",))


def crafted(raw: bytes, draw: random.Random, proof: Path) -> bytes:
    """Put a pickle in the file that runs a command, mend all checksums, and seal it."""
    kind = draw.choice(("whole", "bare", "inside", "global"))
    code = _Runs(proof)
    if kind == "bare":
        return pickle.dumps(code, protocol=draw.randrange(6))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            content = old.read(member)
            if member.endswith("data.pkl"):
                content = {
                    "whole": pickle.dumps(code, protocol=2),
                    # after the first opcode, which tells the protocol
                    "inside": content[:2] + pickle.dumps(code, protocol=2)[2:-1] + b"0" + content[2:],
                    "global": b"\x80\x02c" + draw.choice((b"posix\nsystem", b"builtins\nexec", b"builtins\neval"))
                    + b"\nX" + len(f"touch {proof}").to_bytes(4, "little") + f"touch {proof}".encode() + b"\x85R.",
                }[kind]  # fmt: skip
            new.writestr(member, content)
    sealed = io.BytesIO(buffer.getvalue())
    if draw.random() < 0.7:
        checkpoint_files.append_checksum(sealed)
    return sealed.getvalue()


def _data_start(raw: bytes, member: zipfile.ZipInfo) -> int:
    head = member.header_offset
    name, extra = (int.from_bytes(raw[head + at : head + at + 2], "little") for at in (26, 28))
    return head + 30 + name + extra


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bits, flip_bits, flip_at_end, truncate, cut_out, zero_page, zero_from, swap_pages, append, garbage,
    swap_members, swap_seal,
]  # fmt: skip


def fuzz(
    checkpoint: Path,
    count: int,
    seed: int,
    folder: Path,
    load: Callable[[Path], Any] = _LOAD,
) -> dict[str, Counter[str]]:
    """Load `count` damaged copies of a checkpoint; return what became of them, by the kind of damage."""
    draw = random.Random(seed)
    raw = checkpoint.read_bytes()
    expected = checkpoint_files.load(checkpoint)
    proof, victim = folder / "ran", folder / "victim.ckpt"
    outcomes: dict[str, Counter[str]] = {}
    for number in range(count):
        damage = None if number % 13 == 0 else DAMAGES[number % len(DAMAGES)]
        damaged = damage(raw, draw) if damage else crafted(raw, draw, proof)
        if damaged == raw:
            continue  # a page of zeros was filled with zeros
        victim.write_bytes(damaged)
        try:
            content = load(victim)
            outcome = "harmless" if same(content, expected) else "silent"
        except DamagedCheckpointError as error:
            outcome = "detected" if str(victim) in str(error) else "unclear"
        except Exception as error:
            outcome = f"unclear: {type(error).__name__}"
        if proof.exists():
            proof.unlink()
            outcome = "ran code"
        outcomes.setdefault(damage.__name__ if damage else "crafted", Counter())[outcome] += 1
    return outcomes


def example(path: Path) -> None:
    """Write a checkpoint like those of training."""
    torch.manual_seed(0)
    tables = {"user_model.offsets.weight": torch.randn(9, 64), "policy.lora_A": torch.randn(4, 64)}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(9, 64), "row_steps": torch.arange(9.0)}}
    content = {
        "state_dict": tables | {"policy.lora_B": torch.randn(64, 4)},
        "optimizer_states": [{"state": state, "param_groups": [{"name": "user_tables", "params": [0], "lr": 0.1}]}],
        "prlhf_lightning": {"format": 1, "users": [f"user-{n}" for n in range(8)], "new_rows": {}, "shares": []},
        "global_step": 3,
    }
    checkpoint_files.save(content, path)


def main() -> int:
    """Fuzz and print a table; return how many files were not dealt with as they should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = arguments.checkpoint or folder / "good.ckpt"
        if arguments.checkpoint is None:
            example(checkpoint)
        outcomes = fuzz(checkpoint, arguments.count, arguments.seed, folder)
    total: Counter[str] = Counter()
    for kind, counts in sorted(outcomes.items()):
        print(f"{kind:14}" + "  ".join(f"{outcome} {count}" for outcome, count in counts.most_common()))
        total += counts
    print(f"{'all':14}" + "  ".join(f"{outcome} {count}" for outcome, count in total.most_common()))
    return total.total() - total["detected"] - total["harmless"]


if __name__ == "__main__":
    sys.exit(main() > 0)
