"""Checks of a SQLite file that a process keeps open: is it still there, whole, and can it be written?

SQLite itself goes on without an error where the file that it has open was deleted or moved, and reads damaged pages
only when it needs them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import TypeAlias
from urllib.parse import quote

Identity: TypeAlias = tuple[int, int]
"""Device and inode of a file."""

_LEAST_FREE = 1 << 20  # bytes on the disk, below which the next rows may not fit
_LOCKED_SECONDS = 1.0  # how long a trial waits for the file's lock
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

    def identity(self) -> Identity:
        """Return which file the path names now."""
        found = self._stat()
        return found.st_dev, found.st_ino

    def check_same(self, opened: Identity) -> None:
        """Check that the path still names the file that was opened, and that its log (WAL) is still beside it."""
        if self.identity() != opened:
            raise sqlite3.OperationalError("the file was replaced")
        if not Path(f"{self.path}-wal").exists():
            raise sqlite3.OperationalError("the file's -wal was deleted")

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
                raise sqlite3.DatabaseError("the file is damaged")

    def _find_whole(self) -> bool:
        try:
            with closing(self._connect()) as connection:
                return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
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
            raise sqlite3.OperationalError("the file is gone") from error


def _same_state(found: os.stat_result, known: os.stat_result | None) -> bool:
    return known is not None and all(
        getattr(found, name) == getattr(known, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    )
