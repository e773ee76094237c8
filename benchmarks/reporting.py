"""How the benchmarks tell what they found."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch


def about() -> str:
    """Return the command that runs, and what on."""
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"`{command}`; {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def tell(text: str, out: Path | None) -> None:
    """Print a text, and write it to a file where one is named."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text.rstrip("\n") + "\n")
