"""A server in a process of its own, for the scripts that try it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx


@contextmanager
def server(model: str | Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start `serve` on a free port; give its address and process, once it is ready, and stop it at the end."""
    command = [sys.executable, "-m", "prlhf_lightning", "serve", "--model", str(model), "--port", "0", *options]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, text=True)
        try:
            yield _address(process, log), process
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    while True:
        said = log.read_text()
        found = re.search(r"Serving .* at (http://\S+)", said)
        if found and "startup complete" in said:
            httpx.get(f"{found[1]}/readyz").raise_for_status()
            return found[1]
        if process.poll() is not None:
            sys.exit(f"The server did not start:\n{said}")
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
