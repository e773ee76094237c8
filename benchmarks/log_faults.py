"""What can happen to a feedback log while a server writes to it: faults of SQLite files and of PostgreSQL servers.

Each fault is a function of a `Trial` that brings it about, yields while it lasts, and ends it, as an operator would.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import psycopg
from postgres_cluster import Cluster

from prlhf_lightning.data.feedback_log import FeedbackLog


class Trial(Protocol):
    """A server that takes votes, and its log."""

    path: Path  # of the SQLite file
    folder: Path  # the file's
    url: str  # of the log
    cluster: Cluster
    proxy: Proxy  # between the server and the cluster
    draw: random.Random

    def acknowledged(self) -> set[str]:
        """Return the ids of the votes that were acknowledged up to now."""

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server and start another."""

    def second_server(self) -> None:
        """Start another server on the same log; half of the clients go on with it."""

    def expect(self, kept: set[str], url: str) -> None:
        """Note what must be in another log."""


# Faults after which the votes of before are gone with the log that held them.
DESTROYS = {
    "deleted",
    "file alone deleted",
    "replaced",
    "replaced, -wal left",
    "table dropped",
    "failover to an empty database",
}


def _files(path: Path) -> list[Path]:
    return [found for end in ("", "-wal", "-shm") if (found := Path(f"{path}{end}")).exists()]


def _backup(path: Path, to: Path) -> None:
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def _deleted(trial: Trial, seconds: float) -> Iterator[None]:
    for file in _files(trial.path):
        file.unlink()
    yield
    trial.restart()


def _file_alone_deleted(trial: Trial, seconds: float) -> Iterator[None]:
    trial.path.unlink()
    yield
    for file in _files(trial.path):
        file.unlink()
    trial.restart()


def _moved(trial: Trial, seconds: float) -> Iterator[None]:
    trial.path.rename(trial.folder / "moved.db")
    yield
    (trial.folder / "moved.db").rename(trial.path)


def _moved_whole(trial: Trial, seconds: float) -> Iterator[None]:
    away = trial.folder / "away"
    away.mkdir()
    for file in _files(trial.path):
        file.rename(away / file.name)
    yield
    for file in away.iterdir():
        file.rename(trial.folder / file.name)


def _replaced(trial: Trial, seconds: float) -> Iterator[None]:
    other = trial.folder / "other.db"
    FeedbackLog(str(other)).close()
    for file in _files(trial.path):
        file.unlink()
    other.rename(trial.path)
    yield


def _replaced_wal_left(trial: Trial, seconds: float) -> Iterator[None]:
    other = trial.folder / "other.db"
    FeedbackLog(str(other)).close()
    other.replace(trial.path)
    yield
    for end in ("-wal", "-shm"):  # as the server's log says
        Path(f"{trial.path}{end}").unlink(missing_ok=True)


def _damaged(damage: Callable[[Path, random.Random], None]) -> Callable[[Trial, float], Iterator[None]]:
    def fault(trial: Trial, seconds: float) -> Iterator[None]:
        kept = trial.folder / "backup.db"
        with closing(sqlite3.connect(trial.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else what is damaged may stand in the -wal, too
            connection.execute("BEGIN IMMEDIATE")  # nothing is written between the backup and the damage
            _backup(trial.path, kept)
            damage(trial.path, trial.draw)
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        yield
        with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(trial.path)) as connection:
            connection.execute("SELECT count(*) FROM prlhf_feedback")
            if connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",):
                return  # all that was damaged has been written anew, from the -wal
        for file in _files(trial.path):
            file.unlink()
        kept.rename(trial.path)

    return fault


def _truncate_half(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _truncate_all(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(0)


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(100):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    with path.open("r+b") as file:
        file.write(content)


def _overwrite(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"not a database" * 1000)


def _locked(trial: Trial, seconds: float) -> Iterator[None]:
    hold = "import sqlite3,sys\nc=sqlite3.connect(sys.argv[1],isolation_level=None)\nc.execute('BEGIN IMMEDIATE')\n"
    with subprocess.Popen(
        [sys.executable, "-c", hold + "print(1,flush=True)\ninput()", str(trial.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.kill()


def _disk_full(trial: Trial, seconds: float) -> Iterator[None]:
    """The file lies on a file system of its own (tmpfs)."""
    yield from _filled(trial.folder)


def _filled(folder: Path) -> Iterator[None]:
    """Fill the file system of a folder until the fault is over."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


def _read_only(trial: Trial, seconds: float) -> Iterator[None]:
    """The folder is mounted so over itself; `chmod` does not keep root from writing."""
    subprocess.run(["mount", "--bind", trial.folder, trial.folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", trial.folder], check=True)
    yield
    subprocess.run(["umount", "-l", trial.folder], check=True)


def _deleted_beside(end: str) -> Callable[[Trial, float], Iterator[None]]:
    def fault(trial: Trial, seconds: float) -> Iterator[None]:
        Path(f"{trial.path}{end}").unlink()
        with suppress(Exception):  # a stranger opens the log, and makes new ones
            FeedbackLog(str(trial.path), create=False).extent()
        yield

    return fault


def _killed(trial: Trial, seconds: float) -> Iterator[None]:
    for _ in range(3):
        trial.restart(signal.SIGKILL)
        time.sleep(trial.draw.uniform(0.3, 1.0))
    yield


def _power_loss(trial: Trial, seconds: float) -> Iterator[None]:
    """A copy of the file and its -wal at an instant, with a torn end, must hold what was acknowledged before it."""
    for number in range(5):
        copy = trial.folder / f"copy{number}.db"
        with closing(sqlite3.connect(trial.path)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT max(number) FROM prlhf_feedback").fetchone()  # so that no checkpoint rewrites
            kept = trial.acknowledged()
            for end in ("", "-wal"):
                shutil.copyfile(f"{trial.path}{end}", f"{copy}{end}")
        with Path(f"{copy}-wal").open("ab") as torn:
            torn.write(trial.draw.randbytes(trial.draw.randrange(1, 9000)))
        trial.expect(kept, f"sqlite:///{copy}")
        time.sleep(0.3)
    yield


def _two_servers(trial: Trial, seconds: float) -> Iterator[None]:
    trial.second_server()
    yield
    trial.restart(signal.SIGKILL)


def _read_meanwhile(trial: Trial, seconds: float) -> Iterator[None]:
    """Others read the whole log again and again, and one of them is slow."""
    until = time.monotonic() + seconds
    slow = FeedbackLog(trial.url, create=False).pairs()
    next(slow)
    while time.monotonic() < until:
        log = FeedbackLog(trial.url, create=False)
        assert len(list(log.pairs())) + len(list(log.thumbs())) <= log.extent().rows
        log.close()
    list(slow)
    yield


SQLITE: dict[str, Callable[[Any, float], Iterator[None]]] = {
    "deleted": _deleted,
    "file alone deleted": _file_alone_deleted,
    "moved away and back": _moved,
    "moved with -wal and -shm, and back": _moved_whole,
    "replaced": _replaced,
    "replaced, -wal left": _replaced_wal_left,
    "cut to half, backup put back": _damaged(_truncate_half),
    "emptied, backup put back": _damaged(_truncate_all),
    "100 bits flipped, backup put back": _damaged(_flip),
    "overwritten, backup put back": _damaged(_overwrite),
    "locked by another process": _locked,
    "disk full (tmpfs)": _disk_full,
    "read-only (mount)": _read_only,
    "-wal deleted, opened by another": _deleted_beside("-wal"),
    "-shm deleted, opened by another": _deleted_beside("-shm"),
    "kill -9 and restart, 3 times": _killed,
    "copies as after a power loss, 5 times": _power_loss,
    "two servers, one killed": _two_servers,
    "read meanwhile": _read_meanwhile,
}


class Proxy:
    """A TCP proxy that can stop passing anything on, cut what is open, and lead elsewhere."""

    def __init__(self, port: int) -> None:
        self.target, self.silent, self.refuses = port, False, False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut all connections."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if self.refuses:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                while self.silent:
                    time.sleep(0.05)
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open -= {one, other}


def _stopped(mode: str) -> Callable[[Trial, float], Iterator[None]]:
    def fault(trial: Trial, seconds: float) -> Iterator[None]:
        trial.cluster.stop(mode)
        yield
        trial.cluster.start()

    return fault


def _admin(trial: Trial) -> psycopg.Connection[Any]:
    return psycopg.connect(trial.cluster.url("votes"), autocommit=True)


def _connections_killed(trial: Trial, seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    with _admin(trial) as admin:
        while time.monotonic() < until:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            time.sleep(0.05)
    yield


def _table_locked(trial: Trial, seconds: float) -> Iterator[None]:
    with psycopg.connect(trial.cluster.url("votes")) as other:
        other.execute("LOCK TABLE prlhf_feedback IN ACCESS EXCLUSIVE MODE")
        yield


def _table_dropped(trial: Trial, seconds: float) -> Iterator[None]:
    with _admin(trial) as admin:
        admin.execute("DROP TABLE prlhf_feedback")
    yield
    trial.restart()


def _made_read_only(trial: Trial, seconds: float) -> Iterator[None]:
    with _admin(trial) as admin:
        admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        admin.execute("SELECT pg_reload_conf()")
        yield
        admin.execute("SET transaction_read_only = off")
        admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
        admin.execute("SELECT pg_reload_conf()")


def _tablespace_full(trial: Trial, seconds: float) -> Iterator[None]:
    """The table and its indexes lie on a file system of their own (tmpfs)."""
    with _admin(trial) as admin:
        admin.execute(f"CREATE TABLESPACE small LOCATION '{trial.folder}'")
        admin.execute("ALTER TABLE prlhf_feedback SET TABLESPACE small")
        yield from _filled(trial.folder)


def _frozen(trial: Trial, seconds: float) -> Iterator[None]:
    processes = trial.cluster.processes()
    subprocess.run(["kill", "-STOP", *map(str, processes)], check=True)
    yield
    subprocess.run(["kill", "-CONT", *map(str, processes)], check=True)


def _network_cut(trial: Trial, seconds: float) -> Iterator[None]:
    trial.proxy.refuses = True
    trial.proxy.cut()
    yield
    trial.proxy.refuses = False


def _network_silent(trial: Trial, seconds: float) -> Iterator[None]:
    trial.proxy.silent = True
    yield
    trial.proxy.silent = False


def _failover_to_empty(trial: Trial, seconds: float) -> Iterator[None]:
    """Another database takes the place of the log's, and has no table."""
    with psycopg.connect(trial.cluster.url(), autocommit=True) as admin:
        trial.proxy.refuses = True
        trial.proxy.cut()
        time.sleep(0.5)
        admin.execute("ALTER DATABASE votes RENAME TO old")
        admin.execute("CREATE DATABASE votes")
        trial.proxy.refuses = False
    yield
    trial.restart()


def _commits_in_haste(trial: Trial, seconds: float) -> Iterator[None]:
    """The database's own default no longer waits for the disk, and then it crashes."""
    with _admin(trial) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_commit = off")
        admin.execute("ALTER SYSTEM SET wal_writer_delay = 10000")
        admin.execute("SELECT pg_reload_conf()")
    time.sleep(seconds)
    trial.cluster.stop("immediate")
    trial.cluster.start()
    yield


POSTGRES: dict[str, Callable[[Any, float], Iterator[None]]] = {
    "stopped (fast), started again": _stopped("fast"),
    "crashed (immediate), started again": _stopped("immediate"),
    "connections killed": _connections_killed,
    "table locked": _table_locked,
    "table dropped": _table_dropped,
    "made read-only": _made_read_only,
    "tablespace full (tmpfs)": _tablespace_full,
    "frozen (SIGSTOP)": _frozen,
    "network cut": _network_cut,
    "network silent": _network_silent,
    "failover to an empty database": _failover_to_empty,
    "synchronous_commit off, crashed": _commits_in_haste,
    "kill -9 and restart, 3 times": _killed,
    "two servers, one killed": _two_servers,
    "read meanwhile": _read_meanwhile,
}
