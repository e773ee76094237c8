"""Checks of a SQLite file that a process keeps open: is it still there, whole, and can it be written?

SQLite itself goes on without an error where the file that it has open was deleted or moved, and reads damaged pages
only when it needs them.
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
_LOCKED_SECONDS = 1.0  # how long a trial waits for the file's lock
_SMALL = 8 << 20  # bytes up to which indexes are compared with the table, too, which takes ten times as long
_ENDS = ("", "-wal", "-shm")
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs")
# A check of all pages that took longer than this is followed by a pause that is so many times as long.
_SLOW_SECONDS, _REST = 0.1, 20


class SQLiteFile:
    """The file of a SQLite database in WAL mode.

    All methods raise `sqlite3.Error` where the file is not what it should be. They may be called from any thread.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._state: os.stat_result | None = None  # the file's, when its pages were last checked
        self._is_whole = True
        self._checked, self._seconds = -float("inf"), 0.0
        self._opened: Identity | None = None

    def identity(self) -> Identity:
        """Return which files the paths name now."""
        found = self._stat()
        return (found.st_dev, found.st_ino), *(self._identity(end) for end in _ENDS[1:])

    def opened(self) -> Identity:
        """Return which files there are, just after they were opened, when no other connection was open."""
        self._opened = self.identity()
        return self._opened

    def check_same(self, opened: Identity) -> None:
        """Check that the paths still name the files that were opened."""
        for end, was, now in zip(_ENDS, opened, self.identity(), strict=True):
            if was != now:
                what = f"the file's {end}" if end else "the file"
                raise sqlite3.OperationalError(f"{what} was {'replaced' if now else 'deleted'}")

    def check_openable(self) -> None:
        """Check that opening the file does harm to nothing: SQLite would apply, or delete, a -wal that is not its own.

        Such a -wal stays where the file alone was replaced, deleted or emptied.
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
        """Make the file, if it is not there, such that nobody else can read it.

        SQLite's own would be as the umask says. It gives the files that it puts beside it the same permissions.
        """
        wal = Path(f"{self.path}-wal")
        if not self.path.exists() and wal.exists() and wal.stat().st_size:
            raise sqlite3.OperationalError(
                f"the file is gone, but not its -wal, which may hold the last rows; put it back, or move {wal} away"
            )
        with suppress(OSError):  # it is there, or SQLite will say what is wrong
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def check_pages(self) -> None:
        """Check the structure of all pages, where the file has changed since this was last done.

        In WAL mode the file itself changes about once in a thousand rows. Of a large file, which takes a while to read,
        at most a twentieth of the time goes into it.
        """
        with self._lock:
            state, started = self._stat(), time.monotonic()
            pause = _REST * self._seconds if self._seconds > _SLOW_SECONDS else 0.0
            if not _same_state(state, self._state) and started - self._checked >= pause:
                self._is_whole = self._find_whole()
                self._state, self._checked = state, time.monotonic()
                self._seconds = self._checked - started
            if not self._is_whole:
                raise sqlite3.DatabaseError(
                    "the file is damaged; put a backup in its place, without the -wal and -shm of the damaged one"
                )

    def _find_whole(self) -> bool:
        self.check_openable()
        check = "integrity_check" if self._stat().st_size <= _SMALL else "quick_check"
        try:
            with closing(self._connect()) as connection:
                return bool(connection.execute(f"PRAGMA {check}(1)").fetchone() == ("ok",))
        except sqlite3.OperationalError:  # locked, or gone
            raise
        except sqlite3.DatabaseError:  # no longer the format of SQLite
            return False

    def try_writing(self) -> None:
        """Write to the file what changes nothing, durably; fails on a full disk, a locked or a read-only file."""
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
        """Open the file anew, without what other connections remember of its pages."""
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


def _same_state(found: os.stat_result, known: os.stat_result | None) -> bool:
    return known is not None and all(
        getattr(found, name) == getattr(known, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    )


def network_file_system(path: Path) -> str | None:
    """Return the kind of network file system that a path lies on, such as `nfs4`; None for a local or unknown one."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:  # not Linux
        return None
    parents = {str(folder) for folder in path.absolute().parents}
    kinds = [(len(place), kind) for _, place, kind, *_ in mounts if place in parents]
    kind = max(kinds, default=(0, ""))[1]
    return kind if kind.startswith(_NETWORK) else None
