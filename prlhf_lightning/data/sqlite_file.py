"""Checks that an open SQLite file still exists, is undamaged and writable.

SQLite itself reports no error if its open file was deleted or moved, and it notices damaged pages only when it reads
them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock
from typing import TypeAlias
from urllib.parse import quote

Identity: TypeAlias = tuple[tuple[int, int] | None, ...]
"""Device and inode of the file, of its log (-wal) and of its index (-shm); None for one that is not there."""

_LEAST_FREE = 1 << 20  # bytes on the disk, below which the next rows may not fit
_LOCKED_SECONDS = 1.0  # lock timeout of a trial write
_SMALL = 8 << 20  # bytes; up to this size, indexes are also checked against the table, which takes ten times as long
_ENDS = ("", "-wal", "-shm")
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs")
# After a check of all pages that took longer than this, the next one waits this many times its duration.
_SLOW_SECONDS, _REST = 0.1, 20


class SQLiteFile:
    """The file of a SQLite database in WAL mode.

    All methods raise `sqlite3.Error` if a check fails. They are thread-safe.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._state: os.stat_result | None = None  # state of the file at the last check of its pages
        self._is_whole = True
        self._checked, self._seconds = -float("inf"), 0.0
        self._opened: Identity | None = None

    def identity(self) -> Identity:
        """Return the current identity of the files."""
        found = self._stat()
        return (found.st_dev, found.st_ino), *(self._identity(end) for end in _ENDS[1:])

    def opened(self) -> Identity:
        """Return the identity of the files just after opening, while no other connection is open."""
        self._opened = self.identity()
        return self._opened

    def check_same(self, opened: Identity) -> None:
        """Check that the paths still refer to the opened files."""
        for end, was, now in zip(_ENDS, opened, self.identity(), strict=True):
            if was != now:
                what = f"the file's {end}" if end else "the file"
                raise sqlite3.OperationalError(f"{what} was {'replaced' if now else 'deleted'}")

    def check_openable(self) -> None:
        """Check that the file can be opened safely: SQLite would apply or delete a -wal file of another database.

        Such a -wal remains if only the main file was replaced, deleted or emptied.
        """
        identity, wal = self.identity(), Path(f"{self.path}-wal")
        if not wal.exists() or not wal.stat().st_size:
            return
        advice = f"put back the file that belongs to it, or move {wal} and {self.path}-shm away"
        if not self._stat().st_size:
            raise sqlite3.OperationalError(f"the file is empty, but not its -wal; {advice}")
        if self._opened and self._opened[0] != identity[0] and self._opened[1] == identity[1]:
            raise sqlite3.OperationalError(f"the file was replaced, but its -wal is that of the file before; {advice}")

    def make(self) -> None:
        """Create the file if needed, readable only by its owner.

        SQLite itself would use the umask. It creates the -wal and -shm files with the permissions of the main file.
        """
        wal = Path(f"{self.path}-wal")
        if not self.path.exists() and wal.exists() and wal.stat().st_size:
            raise sqlite3.OperationalError(
                f"the file is gone, but not its -wal, which may hold the last rows; put it back, or move {wal} away"
            )
        with suppress(OSError):  # it exists, or SQLite will report the error
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def check_pages(self) -> None:
        """Check the structure of all pages if the file has changed since the last check.

        In WAL mode the main file changes about once per thousand rows. Checks of a large file take at most a twentieth
        of the time.
        """
        with self._lock:
            state, started = self._stat(), time.monotonic()
            pause = _REST * self._seconds if self._seconds > _SLOW_SECONDS else 0.0
            if not _same_state(state, self._state) and started - self._checked >= pause:
                self._is_whole = self._find_whole()
                self._state, self._checked = state, time.monotonic()
                self._seconds = self._checked - started
            if not self._is_whole:
                raise _damaged()

    def _find_whole(self) -> bool:
        self.check_openable()
        check = "integrity_check" if self._stat().st_size <= _SMALL else "quick_check"
        try:
            with closing(self._connect()) as connection:
                return _passes(connection, check)
        except sqlite3.OperationalError:  # locked, or gone
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):  # no longer in SQLite's format
            return False

    def try_writing(self) -> None:
        """Make a durable write without effect; fails on a full disk, or for a locked or read-only file."""
        system = os.statvfs(self.path.parent) if hasattr(os, "statvfs") else None
        if system is not None and system.f_bavail * system.f_frsize < _LEAST_FREE:
            raise sqlite3.OperationalError("the disk is full")
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version={version}")
            connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        """Open a new connection, without the cached pages of other connections."""
        uri = f"file:{quote(str(self.path.absolute()))}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=_LOCKED_SECONDS, isolation_level=None)

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise sqlite3.OperationalError(
                "the file is gone; put it back, or start the server again to begin an empty one"
            ) from error

    def _identity(self, end: str) -> tuple[int, int] | None:
        try:
            found = os.stat(f"{self.path}{end}")
        except OSError:
            return None
        return found.st_dev, found.st_ino


def check_all(connection: sqlite3.Connection) -> None:
    """Check all pages, the order of all rows, and each index against its table; takes about 25 ms per MB.

    Raises:
        sqlite3.DatabaseError: A check fails.
    """
    if not _passes(connection, "integrity_check"):
        raise _damaged()


def _passes(connection: sqlite3.Connection, check: str) -> bool:
    return bool(connection.execute(f"PRAGMA {check}(1)").fetchone() == ("ok",))


def _damaged() -> sqlite3.DatabaseError:
    return sqlite3.DatabaseError(
        "the file is damaged; put a backup in its place, without the -wal and -shm of the damaged one"
    )


def _same_state(found: os.stat_result, known: os.stat_result | None) -> bool:
    return known is not None and all(
        getattr(found, name) == getattr(known, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    )


def network_file_system(path: Path) -> str | None:
    """Return the type of a path's network file system, such as `nfs4`; None for a local or unknown one."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:  # not Linux
        return None
    parents = {str(folder) for folder in path.absolute().parents}
    kinds = [(len(place), kind) for _, place, kind, *_ in mounts if place in parents]
    kind = max(kinds, default=(0, ""))[1]
    return kind if kind.startswith(_NETWORK) else None
