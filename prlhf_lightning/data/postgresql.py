"""Connections to PostgreSQL with timeouts for a database or network that hangs.

Needs psycopg, of the extra `postgres`.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg

# Defaults of libpq's options, which a URL can override. The kernel closes a connection if the peer does not answer.
PATIENT = {
    "connect_timeout": "5",
    "keepalives_idle": "20",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}


def impatient(seconds: float) -> type[psycopg.Connection[Any]]:
    """Return a connection class that fails and closes if the database does not answer for some seconds."""

    class Impatient(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().wait(_limited(gen, time.monotonic() + seconds), *args, **kwargs)
            except _Silence:
                self.pgconn.finish()  # a late answer would be taken for that of the next statement
                raise

    return Impatient


class _Silence(psycopg.OperationalError):
    """The database does not answer."""


def _limited(waiting: Generator[Any, Any, Any], deadline: float) -> Generator[Any, Any, Any]:
    """Drive psycopg's wait generator with a deadline; it wakes up ten times per second."""
    ready = None
    while True:
        try:
            awaited = waiting.send(ready)
        except StopIteration as end:
            return end.value
        ready = yield awaited
        if not ready and time.monotonic() > deadline:
            raise _Silence("the database does not answer")


ADVICE = {
    "UndefinedTable": "its table is gone: restore it, or start the server again to begin an empty one",
    "UndefinedColumn": "its table is not of this version",
    "LockNotAvailable": "its table is locked by another session",
    "ReadOnlySqlTransaction": "the database takes no writes now",
    "InsufficientPrivilege": "the user lacks the right to read and write its table",
    "DiskFull": "the database's disk is full",
    "_Silence": "the database does not answer",
    "OperationalError": "no connection to the database",
    "ConnectionTimeout": "no connection to the database in time",
    "AdminShutdown": "the database ended the connection",
    "CannotConnectNow": "the database is starting or stopping",
}
"""What errors of psycopg mean for the log, by their classes' names."""
