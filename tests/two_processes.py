"""Two processes that start at once: forked from one that has imported the package, and has no threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

multiprocessing.set_forkserver_preload(["prlhf_lightning.cli"])


def start_two(worker: Callable[..., None], *args: Any) -> None:
    """Run `worker(rank, *args)` in two processes; an error of one is raised here. Their environment is the server's."""
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method="forkserver")
