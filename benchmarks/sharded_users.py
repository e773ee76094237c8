"""What the users cost each process where the policy is sharded: memory, and bytes and time of a step.

    python benchmarks/sharded_users.py

Each process holds the whole user model. In a step it averages the gradients over processes as `PersonalizedLM` does,
clips them, and takes a step; each step meets other users. The policy, whose cost does not depend on the users, is left
out. Memory is exact: bytes of the user model and of the optimiser's state for it. Traffic is what a process hands over
to be gathered or averaged.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prlhf_lightning.training import RowwiseAdamW
from prlhf_lightning.training.distributed import average_dense_gradients, average_sparse_gradients, sparse_tables
from prlhf_lightning.training.optim import clip_gradients
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import ClusterUserModel, IndividualUserModel, UserModel


def make(kind: str, args: argparse.Namespace) -> UserModel:
    """Return a user model to build."""
    if kind == "cluster":
        return ClusterUserModel(args.clusters, args.num_tokens)
    return IndividualUserModel(args.num_tokens)


class Traffic:
    """Collectives that count the bytes that this process hands over."""

    def __init__(self, processes: int) -> None:
        self.processes, self.bytes = processes, 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked."""
        self.bytes += tensor.numel() * tensor.element_size()
        gathered = tensor.new_empty(self.processes, *tensor.shape)
        torch.distributed.all_gather(list(gathered.unbind()), tensor)
        return gathered

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes."""
        self.bytes += tensor.numel() * tensor.element_size()
        torch.distributed.all_reduce(tensor)
        return tensor / self.processes


def measure(rank: int, kind: str, users: int, folder: str, args: argparse.Namespace) -> None:
    """Take steps in one of the processes; the first one writes down what they cost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=args.processes
    )
    model = make(kind, args)
    model.build(users + 1, torch.randn(64, args.width))
    tables = sparse_tables(model)
    dense = [param for param in model.parameters() if all(param is not table for table in tables)]
    optimizer = RowwiseAdamW(model.parameters(), lr=1e-3)
    traffic = Traffic(args.processes)
    draw = torch.Generator().manual_seed(rank)
    seconds = []
    for _ in range(args.repeats + 2):
        optimizer.zero_grad()
        model(Users(torch.randint(1, users + 1, (args.pairs,), generator=draw))).vectors.square().sum().backward()
        torch.distributed.barrier()
        start, traffic.bytes = time.perf_counter(), 0
        average_sparse_gradients(tables, traffic.all_gather)
        average_dense_gradients(dense, traffic.average)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    kept: list[Any] = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    memory = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    if rank == 0:
        torch.save((memory, traffic.bytes, statistics.median(seconds[2:])), f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["cluster", "individual"], choices=["cluster", "individual"])
    parser.add_argument("--num_tokens", type=int, default=10, help="soft-prompt vectors a user")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--width", type=int, default=128, help="width of a vector")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of each process in a step, each of another user")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--most_bytes", type=float, default=8e9, help="leave out sizes that take more in all processes")
    args = parser.parse_args()
    print(f"{args.processes} processes, {args.pairs} pairs each, {args.num_tokens} vectors of width {args.width}\n")
    print("| user model | users | MB a process | bytes a user | kB handed over a step | ms a step |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in args.kinds:
        for users in args.users:
            row = args.clusters if kind == "cluster" else args.num_tokens * args.width
            if users * row * 12 * args.processes > args.most_bytes:
                print(f"| {kind} | {users:,} | more than --most_bytes | | | |")
                continue
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(measure, args=(kind, users, folder, args), nprocs=args.processes)
                memory, traffic, seconds = torch.load(Path(folder) / "result.pt")
            cells = f"{memory / 1e6:,.1f} | {memory / users:,.1f} | {traffic / 1e3:,.1f} | {seconds * 1e3:.2f}"
            print(f"| {kind} | {users:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
