"""Durable log of users' feedback in a database: its table, writing and reading.

It is in `data`, not in `serving`, because the server writes it and `data.sources.FeedbackLogSource` reads it. Needs the
extra `serve` (SQLAlchemy), and `postgres` for PostgreSQL.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias, cast
from uuid import uuid4

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, NoSuchModuleError, OperationalError, ProgrammingError, SQLAlchemyError

from prlhf_lightning.data.sqlite_file import SQLiteFile, check_all, network_file_system
from prlhf_lightning.errors import ConfigurationError, PRLHFError

_log = logging.getLogger(__name__)
Prompt: TypeAlias = str | list[dict[str, str]]

FEEDBACK = sql.Table(
    "prlhf_feedback",
    sql.MetaData(),
    # SQLite autoincrements only INTEGER columns.
    sql.Column("number", sql.BigInteger().with_variant(sql.Integer, "sqlite"), primary_key=True),
    sql.Column("source", sql.Text, nullable=False),
    sql.Column("id", sql.Text, nullable=False),
    sql.Column("received", sql.Double, nullable=False),
    sql.Column("user_id", sql.Text, nullable=False, index=True),
    sql.Column("user_text", sql.Text),
    sql.Column("prompt", sql.Text, nullable=False),  # JSON: a string, or messages
    sql.Column("chosen", sql.Text),
    sql.Column("rejected", sql.Text),
    sql.Column("completion", sql.Text),
    sql.Column("liked", sql.Boolean),
    sql.Column("digest", sql.Text),  # of the submitted columns; null in rows of older versions
    sql.UniqueConstraint("source", "id"),
    sqlite_autoincrement=True,  # never reuse the number of a removed row
)

_ROWS = 1000  # read at a time
_ORDER = 0x7072_6C68  # key of the PostgreSQL advisory lock that serializes row numbers
_LOCKED_MS = 4000  # timeout of a write that waits for the log's lock
_SILENT_SECONDS = 8.0  # timeout of PostgreSQL's answers; longer than that of locks
_PROBE_LOCKED_SECONDS, _PROBE_SILENT_SECONDS = 1.0, 3.0  # shorter timeouts of health checks


class FeedbackLogError(PRLHFError, OSError):
    """The log cannot be written or read now, for instance on a full disk or without a database connection."""


class ConflictError(PRLHFError, ValueError):
    """An id that is already used for other feedback."""


@dataclass(frozen=True)
class Feedback:
    """Feedback of one user: a preference between two answers, or a label of one answer.

    Attributes:
        source: Name of the API key that submitted it, or empty.
        id: Unique id within the source; feedback submitted twice counts once.
        received: Time of receipt in seconds since 1970 (UTC).
        user_id: The user's id.
        prompt: The prompt.
        chosen: The better of two answers.
        rejected: The other answer; equal to `chosen` for a tie.
        completion: The single answer, for unpaired feedback.
        liked: Whether the user liked the single answer.
        user_text: Text about the user, or None.
    """

    source: str
    id: str
    received: float
    user_id: str
    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    liked: bool | None = None
    user_text: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the columns of the table; equal prompts become equal texts."""
        row = {**vars(self), "prompt": json.dumps(self.prompt, sort_keys=True), "received": float(self.received)}
        return row | {"digest": _digest(row)}


class Extent(NamedTuple):
    """Number of rows up to the last one, and the last row's number."""

    rows: int
    last: int


class FeedbackLog:
    """Feedback log in a database; thread-safe and process-safe.

    After `append` returns, the row survives a crash of the process or the machine: SQLite runs in WAL mode with
    `synchronous=FULL`; in PostgreSQL, `append` sets `synchronous_commit=on` if it is off. Only the owner can read a new
    SQLite file. `append` detects a SQLite file that was deleted, moved, replaced or damaged while open. If the database
    hangs, `append` and `check` fail after some seconds. Each row has a digest, so reading detects values that changed
    on disk.

    Args:
        url: `sqlite:///feedback.db`, `postgresql://user@host/database`, or the path of a SQLite file. The query of a
            PostgreSQL URL is passed to libpq: `?sslmode=verify-full&connect_timeout=3`.
        create: Open the log for writing and create the table if needed. Otherwise the log is read-only, without
            timeouts.

    Raises:
        ConfigurationError: The URL is invalid, the database's driver is not installed, or the database cannot store the
            log: the table has another version or is not durable (UNLOGGED), or the encoding is not UTF-8.
        FeedbackLogError: The database cannot be opened.
    """

    def __init__(self, url: str, create: bool = True) -> None:
        try:
            address = sql.make_url(url if "://" in url else f"sqlite:///{url}")
            if address.drivername in ("postgres", "postgresql"):
                address = address.set(drivername="postgresql+psycopg")
            self._is_sqlite = address.get_backend_name() == "sqlite"
            self._file: SQLiteFile | None = None
            if self._is_sqlite and address.database in (None, "", ":memory:"):
                raise ConfigurationError("url: a feedback log in memory would be lost; write sqlite:///file.db.")
            if self._is_sqlite and not create and not Path(str(address.database)).is_file():
                raise ConfigurationError(f"url: there is no feedback log {address.database}; check the path.")
            self.name = address.render_as_string(hide_password=True)
            self._advice: Mapping[str, str] = _SQLITE_ADVICE
            if address.get_backend_name() == "postgresql":
                self._engine, self._probe, self._advice = _postgresql(address, create)
                self._reader = self._engine
            else:
                self._engine = sql.create_engine(address)
                # A separate pool: the connection of `append` must be opened while no other is open.
                self._reader = sql.create_engine(address, poolclass=sql.NullPool)
                self._probe = self._engine
        except (SQLAlchemyError, ValueError, ImportError) as error:
            if isinstance(error, PRLHFError):
                raise
            missing = isinstance(error, ImportError | NoSuchModuleError)
            fix = "pip install 'prlhf-lightning[postgres]'" if missing else "write sqlite:///file.db or postgresql://…"
            raise ConfigurationError(
                f"The feedback log's URL can't be used ({type(error).__name__}); {fix}."
            ) from error
        self._turn = Lock()  # serializes writes to SQLite, which has a single writer anyway
        with self._errors():
            if self._is_sqlite:
                if "uri" not in address.query:
                    self._file = SQLiteFile(Path(str(address.database)))
                for engine in (self._engine, self._reader):
                    sql.event.listen(engine, "do_connect", self._before_connect)
                    sql.event.listen(engine, "connect", self._after_connect)
            if create:
                self._make()
            self._check_table()

    def _make(self) -> None:
        """Create the table if it does not exist."""
        if self._file is not None:
            self._file.make()
            kind = network_file_system(self._file.path)
            if kind:
                _log.warning(
                    "The feedback log %s lies on a network file system (%s), on which SQLite is safe for the processes "
                    "of one machine at most; use PostgreSQL for several.",
                    self.name,
                    kind,
                )
        try:
            FEEDBACK.metadata.create_all(self._engine)
        except (ProgrammingError, IntegrityError, OperationalError) as error:
            if not any(sign in str(error.orig) for sign in ("already exists", "duplicate key")):
                raise
            FEEDBACK.metadata.create_all(self._engine)  # another process has just created it
        if self._found_columns() == {column.name for column in FEEDBACK.c} - {"digest"}:  # of an older version
            try:
                with self._engine.begin() as connection:
                    connection.execute(sql.text(f"ALTER TABLE {FEEDBACK.name} ADD COLUMN digest TEXT"))
            except (ProgrammingError, OperationalError):
                if "digest" not in self._found_columns():  # another process may have added it
                    _log.warning(
                        "The feedback log %s was made by an older version, and this user may not change its table: "
                        "its rows get no digests, by which damage on the disk would be noticed. Let the table's owner "
                        "run ALTER TABLE %s ADD COLUMN digest TEXT, and start again.",
                        self.name,
                        FEEDBACK.name,
                    )

    def _found_columns(self) -> set[str]:
        """Return the names of the table's columns."""
        with self._reader.connect() as connection:
            found = sql.inspect(connection)
            if not found.has_table(FEEDBACK.name):
                raise ConfigurationError(f"{self.name} has no table {FEEDBACK.name}: it is not a feedback log.")
            return {column["name"] for column in found.get_columns(FEEDBACK.name)}

    def _check_table(self) -> None:
        """Reject a table that cannot store the log."""
        found = self._found_columns()
        self._columns = [column for column in FEEDBACK.c if column.name in found or column.name != "digest"]
        with self._reader.connect() as connection:
            missing = {column.name for column in self._columns} - found
            if missing:
                raise ConfigurationError(
                    f"{self.name}: the table {FEEDBACK.name} has no column {', '.join(sorted(missing))}; it was made "
                    "by another version or program. Rename it, or name another log."
                )
            if not self._is_sqlite:
                _check_durable(connection, self.name)

    def append(self, feedback: Feedback) -> bool:
        """Write feedback durably; return False if the same feedback is already in the log.

        Raises:
            ConflictError: Its id is used for other feedback of the same source.
            FeedbackLogError: It could not be written.
        """
        names = {column.name for column in self._columns}
        row = {name: value for name, value in feedback.row().items() if name in names}
        with self._errors(), self._connection(_LOCKED_MS / 1000) as connection:
            try:
                if not self._is_sqlite:
                    connection.execute(_DURABLY, {"ms": str(_LOCKED_MS)})
                    # Rows must become visible in the order of their numbers; `until` needs it.
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_ORDER)))
                connection.execute(FEEDBACK.insert(), row)
                connection.commit()
                self._check_same_file(connection)
                return True
            except IntegrityError:
                connection.rollback()
                if not self._is_sqlite:
                    connection.execute(_DURABLY, {"ms": str(_LOCKED_MS)})
                same = (FEEDBACK.c.source == feedback.source) & (FEEDBACK.c.id == feedback.id)
                found = connection.execute(sql.select(*self._columns).where(same)).mappings().one()
                self._check_same_file(connection)
        _check_row(found, self.name)
        if any(found[name] != value for name, value in row.items() if name not in ("received", "digest")):
            raise ConflictError(f"The id {feedback.id!r} stands for other feedback; give each judgment its own.")
        return False

    def extent(self, until: int | None = None) -> Extent:
        """Return the extent of the log, or of its rows up to the number `until`."""
        query = sql.select(sql.func.count(), sql.func.coalesce(sql.func.max(FEEDBACK.c.number), 0))
        if until is not None:
            query = query.where(FEEDBACK.c.number <= until)
        with self._errors(), self._reader.connect() as connection:
            return Extent(*connection.execute(query).one())

    def pairs(self, until: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row number and content of each pair, in the order of receipt, without ties.

        Args:
            until: Number of the last row to read.
        """
        yield from self._records(_is_pair, until)

    def newest_pairs(self, user_id: str, most: int) -> list[dict[str, Any]]:
        """Return a user's last pairs, at most `most`, in the order of receipt, without ties."""
        query = sql.select(*self._columns).where(FEEDBACK.c.user_id == user_id).order_by(FEEDBACK.c.number.desc())
        found: list[dict[str, Any]] = []
        with self._errors(), self._reader.connect() as connection:
            if self._file is not None:
                self._file.check_pages()
            for row in connection.execute(query.execution_options(yield_per=_ROWS)).mappings():
                record = _record(row, self.name)
                if _is_pair(row):
                    found.append(record)
                if len(found) >= most:
                    break
        return found[::-1]

    def thumbs(self, until: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row number and content of each thumb, in the order of receipt.

        Args:
            until: Number of the last row to read.
        """
        yield from self._records(_is_thumb, until)

    def _records(self, wanted: Callable[[Mapping[Any, Any]], bool], until: int | None) -> Iterator[tuple[int, Any]]:
        # Every row is read and checked: a query for pairs would pass over one that damage made into something else.
        query = sql.select(*self._columns)
        if until is not None:
            query = query.where(FEEDBACK.c.number <= until)
        query = query.order_by(FEEDBACK.c.number).execution_options(yield_per=_ROWS)
        with self._errors(), self._reader.connect() as connection:
            if self._is_sqlite:
                check_all(cast("sqlite3.Connection", connection.connection.driver_connection))
            for row in connection.execute(query).mappings():
                record = _record(row, self.name)
                if wanted(row):
                    yield row["number"], record

    def check(self) -> None:
        """Check within a few seconds that the log can be read and written.

        Raises:
            FeedbackLogError: It cannot.
        """
        with self._errors(), self._connection(_PROBE_LOCKED_SECONDS, self._probe) as connection:
            if self._file is not None:
                connection.execute(sql.select(FEEDBACK.c.number).limit(1))
                self._file.try_writing()
                self._check_same_file(connection)
            elif not self._is_sqlite:
                self._try_writing(connection)

    def _try_writing(self, connection: sql.Connection) -> None:
        """Write and delete a row in PostgreSQL durably, in one transaction that others never see."""
        connection.execute(_DURABLY, {"ms": str(round(_PROBE_LOCKED_SECONDS * 1000))})
        name = f"trial {uuid4().hex}"
        row = Feedback(name, name, time.time(), name, "", completion="", liked=True).row()
        with connection.begin_nested() as trial:
            connection.execute(FEEDBACK.insert(), row)
            trial.rollback()
        connection.commit()

    def close(self) -> None:
        """Close all connections."""
        for engine in (self._engine, self._reader, self._probe):
            engine.dispose()

    @contextmanager
    def _connection(self, seconds: float, engine: sql.Engine | None = None) -> Iterator[sql.Connection]:
        """Yield a connection for writing to the current database.

        Args:
            seconds: Timeout for other threads that write to SQLite.
            engine: Engine of the connection; by default the log's.
        """
        engine = engine or self._engine
        if self._file is None:
            with engine.connect() as connection:
                yield connection
            return
        if not self._turn.acquire(timeout=seconds):
            raise sqlite3.OperationalError("other feedback waits for the file")
        try:
            with engine.connect() as connection:
                if connection.info["identity"] == self._file.identity():
                    self._file.check_pages()
                    yield connection
                    return
            engine.dispose()  # the file was replaced, for instance by a backup
            with engine.connect() as connection:
                self._file.check_pages()
                yield connection
        finally:
            self._turn.release()

    def _check_same_file(self, connection: sql.Connection) -> None:
        if self._file is not None:
            self._file.check_same(connection.info["identity"])

    def _before_connect(self, *_: Any) -> None:
        """Keep SQLite from creating an empty file in place of a missing log, or mixing the log with another file."""
        if self._file is not None:
            self._file.check_openable()

    def _after_connect(self, connection: Any, record: Any) -> None:
        """Make writes durable, and store the identity of the opened file."""
        for setting in (f"busy_timeout={_LOCKED_MS}", "journal_mode=WAL", "synchronous=FULL", "fullfsync=ON"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opens the -wal and -shm files
        if self._file is not None:
            record.info["identity"] = self._file.opened()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn database errors, whose messages quote the written values, into errors that do not quote them."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, UnicodeDecodeError) as error:
            # Connections may cache pages of a removed file, or point to a server that is no longer the primary.
            self._engine.dispose()
            raise FeedbackLogError(f"The feedback log {self.name} can't be used now ({self._reason(error)}).") from None

    def _reason(self, error: Exception) -> str:
        """Return the reason of an error, without the written values."""
        cause = getattr(error, "orig", None) or error
        # Python's sqlite3 can't decode a damaged text, nor a message of SQLite's that quotes a damaged name.
        if isinstance(cause, UnicodeDecodeError) or str(cause).startswith("Could not decode"):  # followed by the text
            return "a text in it is damaged; put a backup in its place"
        if isinstance(cause, sqlite3.Error):
            if not hasattr(cause, "sqlite_errorname"):  # from our own checks
                return str(cause)
            if str(cause).startswith("no such table"):
                return f"{cause}; put a backup in its place, or start the server again to begin an empty one"
            # Such as SQLITE_IOERR_WRITE; errors of our own checks have no such name.
            name = cause.sqlite_errorname
            return next((text for kind, text in self._advice.items() if name.startswith(kind)), name)
        name = type(cause).__name__
        return self._advice.get(name, name)


_SQLITE_ADVICE = {
    "SQLITE_BUSY": "locked by another process",
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "it is read-only",
    "SQLITE_CANTOPEN": "it can't be opened; check the path and its permissions",
    "SQLITE_CORRUPT": "the file is damaged; put a backup in its place",
    "SQLITE_NOTADB": "the file is damaged; put a backup in its place",
}
# A transaction's lock timeout, and durable commits even if the database's own setting disables them.
_DURABLY = sql.text(
    "SELECT set_config('lock_timeout', :ms, true), set_config('synchronous_commit', "
    "CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, "
    "true)"
)


def _postgresql(address: sql.URL, writes: bool) -> tuple[sql.Engine, sql.Engine, Mapping[str, str]]:
    """Return the engine for PostgreSQL, the engine for health checks, and explanations of error codes."""
    from prlhf_lightning.data import postgresql

    patient = {name: value for name, value in postgresql.PATIENT.items() if name not in address.query}
    address = address.update_query_dict(patient)
    hasty = address.update_query_dict({"connect_timeout": "2"})
    # Prepared statements do not work through a pooler such as PgBouncer.
    given = {"connect_args": {"prepare_threshold": None}}
    engine = sql.create_engine(address, pool_pre_ping=True, **given)
    probe = sql.create_engine(hasty, poolclass=sql.NullPool, **given)
    for made, seconds in ((engine, _SILENT_SECONDS), (probe, _PROBE_SILENT_SECONDS)):
        if writes:
            connect = postgresql.impatient(seconds).connect
            sql.event.listen(made, "do_connect", lambda *a, connect=connect: connect(*a[2], **a[3]))
    return engine, probe, postgresql.ADVICE


def _check_durable(connection: sql.Connection, name: str) -> None:
    """Reject a PostgreSQL database that could lose or change acknowledged rows."""
    encoding = connection.execute(sql.text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        raise ConfigurationError(f"{name}: the database's encoding is {encoding}; make one with ENCODING 'UTF8'.")
    kind = connection.execute(
        sql.text(f"SELECT relpersistence FROM pg_class WHERE oid = to_regclass('{FEEDBACK.name}')")
    ).scalar_one()
    if kind not in ("p", b"p"):
        raise ConfigurationError(
            f"{name}: the table {FEEDBACK.name} is not durable; ALTER TABLE {FEEDBACK.name} SET LOGGED."
        )
    if connection.execute(sql.text("SHOW fsync")).scalar_one() != "on":
        _log.warning("The database of the feedback log %s has fsync off: a power loss can lose feedback.", name)


def _digest(row: Mapping[Any, Any]) -> str:
    """Return the SHA-256 of the submitted columns, without the row number."""
    values = [row[column.name] for column in FEEDBACK.c if column.name not in ("number", "digest")]
    return sha256(json.dumps(values, default=str).encode()).hexdigest()


def _check_row(row: Mapping[Any, Any], log: str) -> None:
    """Check that a row is unchanged, if it has a digest, and a pair or a thumb."""
    # Damage can remove the digest and leave the row readable; then the row is often neither.
    are_there = [row[name] is not None for name in ("chosen", "rejected", "completion", "liked")]
    is_changed = row.get("digest") is not None and row["digest"] != _digest(row)
    if is_changed or are_there not in ([True, True, False, False], [False, False, True, True]):
        raise _damaged(row, log, "does not have the values that were written")


def _damaged(row: Mapping[Any, Any], log: str, what: str) -> FeedbackLogError:
    number = row["number"]
    return FeedbackLogError(
        f"The feedback log {log} is damaged: row {number} {what}. Restore the log from a backup, or delete the row: "
        f"DELETE FROM {FEEDBACK.name} WHERE number = {number}."
    )


def _is_pair(row: Mapping[Any, Any]) -> bool:
    """Return whether a row is a pair, and no tie."""
    return None not in (row["chosen"], row["rejected"]) and row["chosen"] != row["rejected"]


def _is_thumb(row: Mapping[Any, Any]) -> bool:
    return row["completion"] is not None


def _record(row: Mapping[Any, Any], log: str) -> dict[str, Any]:
    """Return a row in the form that `data.records.parse_record` reads."""
    _check_row(row, log)
    try:
        prompt = json.loads(row["prompt"])
    except ValueError:  # its message would quote the value
        raise _damaged(row, log, "has a prompt that is no JSON") from None
    record = {"user_id": row["user_id"], "user_text": row["user_text"], "prompt": prompt}
    for name in ("chosen", "rejected") if row["completion"] is None else ("completion",):
        text = row[name]
        record[name] = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    if row["liked"] is not None:
        record["label"] = row["liked"]
    return record
