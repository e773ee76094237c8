"""A PostgreSQL server for a test or a measurement: made on the spot, thrown away afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


@cache
def binaries() -> Path | None:
    """Return the folder of `initdb` and `pg_ctl`, or None where PostgreSQL's server is not installed."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).resolve().parent if found else debian[-1].parent if debian else None


class Cluster:
    """A PostgreSQL server on 127.0.0.1. It refuses to run as root, so root runs it as the user `nobody`.

    Args:
        folder: An empty folder of the caller's.
        durable: Whether it waits for the disk, which tests need not.
    """

    def __init__(self, folder: Path, durable: bool) -> None:
        self._more = "" if durable else "-F"
        self._data, self._log = folder / "data", folder / "log"
        self._databases, self._user = 0, dict[str, Any]()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._call("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")

    def url(self, database: str = "postgres", port: int | None = None) -> str:
        """Return the address of a database."""
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def new_database(self, more: str = "") -> str:
        """Make an empty database; return its address.

        Args:
            more: What else its `CREATE DATABASE` says.
        """
        import psycopg

        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self.url(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} {more}".encode())
        return self.url(name)

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        options = f"-p {self.port} -h 127.0.0.1 -k '' {self._more}"
        self._call("pg_ctl", "-D", str(self._data), "-l", str(self._log), "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server: `fast` ends connections in order, `immediate` is like a crash."""
        self._call("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def processes(self) -> list[int]:
        """Return the ids of the server's processes."""
        main = (self._data / "postmaster.pid").read_text().split()[0]
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [int(main), *map(int, children)]

    def _call(self, name: str, *arguments: str) -> None:
        folder = binaries()
        assert folder is not None
        # A pipe would be kept open by the server; nothing reads a working folder that may not be `nobody`'s to enter.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                [str(folder / name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd="/",
                **self._user,
            )
            if done.returncode:
                said.seek(0)
                raise RuntimeError(f"{name}: {said.read().decode()}")


@contextmanager
def running_cluster(durable: bool = True) -> Iterator[Cluster]:
    """Give a PostgreSQL server that runs; remove it at the end."""
    memory = "/dev/shm" if not durable and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="postgres-", dir=memory) as folder:
        cluster = Cluster(Path(folder), durable)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
