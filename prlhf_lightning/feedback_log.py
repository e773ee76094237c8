"""The durable log of the feedback that people give on answers: its one table, and how it is written and read.

Here and not in `serving`, because the server writes what `data.sources.FeedbackLogSource` reads. Needs the extra
`serve` (SQLAlchemy), and `postgres` for PostgreSQL.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.sqlite_file import SQLiteFile

Prompt: TypeAlias = str | list[dict[str, str]]

FEEDBACK = sql.Table(
    "prlhf_feedback",
    sql.MetaData(),
    # SQLite gives numbers of its own to INTEGER columns only.
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
    sql.UniqueConstraint("source", "id"),
    sqlite_autoincrement=True,  # so that the number of a removed row is never given to another
)

_IS_PAIR = FEEDBACK.c.chosen != FEEDBACK.c.rejected
_ORDER = 0x7072_6C68  # of the PostgreSQL lock under which rows get their numbers
_LOCKED_MS = 10_000  # how long a write waits while somebody else holds the log's lock


class FeedbackLogError(PRLHFError, OSError):
    """The log can't be written or read now, as on a full disk or without a connection to the database."""


class ConflictError(PRLHFError, ValueError):
    """An id that already stands for other feedback."""


@dataclass(frozen=True)
class Feedback:
    """What one person thought: which of two answers was better, or whether one was good.

    Attributes:
        source: Who handed it in: the name of an API key, or nothing.
        id: Tells it apart from all other feedback of the same source; handing it in twice counts once.
        received: When, in seconds since 1970 (UTC).
        user_id: Who judged.
        prompt: What was answered.
        chosen: The better answer of two.
        rejected: The other. The same text as `chosen` stands for a tie.
        completion: The one answer that was judged.
        liked: Whether it was good.
        user_text: What is known about the user, or nothing.
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
        """Return the columns of the table. Equal prompts are equal texts."""
        return {**vars(self), "prompt": json.dumps(self.prompt, sort_keys=True)}


class Extent(NamedTuple):
    """How many rows there are up to the last, and that row's number."""

    rows: int
    last: int


class FeedbackLog:
    """Feedback in a database. Safe to use from several threads and processes at once.

    SQLite runs in WAL mode with `synchronous=FULL`, so that what `append` has returned for outlives a crash of the
    process and of the machine; so it does in PostgreSQL with its default settings. Only the owner can read a new
    SQLite file. A SQLite file that is deleted, moved, replaced or damaged while it is open is noticed by `append`.

    Args:
        url: `sqlite:///feedback.db`, `postgresql://user@host/database`, or the path of a SQLite file.
        create: Make the table if it is not there.

    Raises:
        ConfigurationError: The URL is none, or its database's driver is not installed.
        FeedbackLogError: The database can't be opened.
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
            self._engine = sql.create_engine(address, pool_pre_ping=True)
        except (SQLAlchemyError, ValueError, ImportError) as error:
            if isinstance(error, PRLHFError):
                raise
            missing = isinstance(error, ImportError | NoSuchModuleError)
            fix = "pip install 'prlhf-lightning[postgres]'" if missing else "write sqlite:///file.db or postgresql://…"
            raise ConfigurationError(
                f"The feedback log's URL can't be used ({type(error).__name__}); {fix}."
            ) from error
        if self._is_sqlite:
            if "uri" not in address.query:
                self._file = SQLiteFile(Path(str(address.database)))
                if create:
                    _make_private(self._file.path)
                sql.event.listen(self._engine, "do_connect", self._before_connect)
            sql.event.listen(self._engine, "connect", self._after_connect)
        if create:
            with self._errors():
                try:
                    FEEDBACK.metadata.create_all(self._engine)
                except DBAPIError:  # another process may have made it since it was looked for
                    FEEDBACK.metadata.create_all(self._engine)

    def append(self, feedback: Feedback) -> bool:
        """Write feedback down for good. Return False where the same had been written before.

        Raises:
            ConflictError: Its id stands for other feedback of the same source.
            FeedbackLogError: It could not be written.
        """
        row = feedback.row()
        with self._errors(), self._connection() as connection:
            try:
                if not self._is_sqlite:
                    connection.execute(sql.text(f"SET LOCAL lock_timeout = {_LOCKED_MS}"))
                    # Rows become visible in the order of their numbers, as `until` needs.
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_ORDER)))
                connection.execute(FEEDBACK.insert(), row)
                connection.commit()
                self._check_same_file(connection)
                return True
            except IntegrityError:
                connection.rollback()
                same = (FEEDBACK.c.source == feedback.source) & (FEEDBACK.c.id == feedback.id)
                found = connection.execute(sql.select(FEEDBACK).where(same)).mappings().one()
                self._check_same_file(connection)
        if any(found[name] != value for name, value in row.items() if name != "received"):
            raise ConflictError(f"The id {feedback.id!r} stands for other feedback; give each judgement its own.")
        return False

    def extent(self, until: int | None = None) -> Extent:
        """Return how far the log goes, or what there is of it up to a row's number."""
        query = sql.select(sql.func.count(), sql.func.coalesce(sql.func.max(FEEDBACK.c.number), 0))
        if until is not None:
            query = query.where(FEEDBACK.c.number <= until)
        with self._errors(), self._engine.connect() as connection:
            return Extent(*connection.execute(query).one())

    def pairs(self, until: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each pair after its row's number, in the order of receipt, without ties.

        Args:
            until: The last row's number that counts.
        """
        yield from self._records(sql.select(FEEDBACK).where(_IS_PAIR), until)

    def newest_pairs(self, user_id: str, most: int) -> list[dict[str, Any]]:
        """Return a user's last pairs, at most so many, in the order of receipt, without ties."""
        query = sql.select(FEEDBACK).where(_IS_PAIR, FEEDBACK.c.user_id == user_id)
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query.order_by(FEEDBACK.c.number.desc()).limit(most)).mappings().all()
        return [_record(row) for row in reversed(rows)]

    def thumbs(self, until: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each thumb after its row's number, in the order of receipt.

        Args:
            until: The last row's number that counts.
        """
        yield from self._records(sql.select(FEEDBACK).where(FEEDBACK.c.completion.is_not(None)), until)

    def _records(self, query: sql.Select[Any], until: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        if until is not None:
            query = query.where(FEEDBACK.c.number <= until)
        query = query.order_by(FEEDBACK.c.number).execution_options(yield_per=1000)
        with self._errors(), self._engine.connect() as connection:
            for row in connection.execute(query).mappings():
                yield row["number"], _record(row)

    def check(self) -> None:
        """Raise FeedbackLogError where the log can't be read and written now.

        Of PostgreSQL only reading is tried.
        """
        with self._errors(), self._connection() as connection:
            connection.execute(sql.select(FEEDBACK.c.number).limit(1))
            if self._file is not None:
                self._file.try_writing()
                self._check_same_file(connection)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _connection(self) -> Iterator[sql.Connection]:
        """Give a connection to the database as it is on disk now."""
        if self._file is None:
            with self._engine.connect() as connection:
                yield connection
            return
        with self._engine.connect() as connection:
            if connection.info["identity"] == self._file.identity():
                self._file.check_pages()
                yield connection
                return
        self._engine.dispose()  # another file is there now, as from a backup
        with self._engine.connect() as connection:
            self._file.check_pages()
            yield connection

    def _check_same_file(self, connection: sql.Connection) -> None:
        if self._file is not None:
            self._file.check_same(connection.info["identity"])

    def _before_connect(self, *_: Any) -> None:
        """Keep SQLite from making a new, empty file where the log was."""
        if self._file is not None:
            self._file.identity()

    def _after_connect(self, connection: Any, record: Any) -> None:
        """Make writes durable, and remember which file was opened."""
        for setting in (f"busy_timeout={_LOCKED_MS}", "journal_mode=WAL", "synchronous=FULL", "fullfsync=ON"):
            connection.execute(f"PRAGMA {setting}")
        if self._file is not None:
            record.info["identity"] = self._file.identity()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the database, whose messages quote what was to be written, into ours, which do not."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            if self._file is not None:
                self._engine.dispose()  # whose connections may remember pages of a file that is damaged or gone
            cause = getattr(error, "orig", None) or error
            # What our own checks say of the file quotes nothing that was to be written.
            detail = str(cause) if isinstance(error, sqlite3.Error) else type(cause).__name__
            raise FeedbackLogError(f"The feedback log {self.name} can't be used now ({detail}).") from None


def _record(row: Any) -> dict[str, Any]:
    """Return a row in the form that `data.records.parse_record` reads."""
    prompt = json.loads(row["prompt"])
    record = {"user_id": row["user_id"], "user_text": row["user_text"], "prompt": prompt}
    for name in ("chosen", "rejected") if row["completion"] is None else ("completion",):
        text = row[name]
        record[name] = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    if row["liked"] is not None:
        record["label"] = row["liked"]
    return record


def _make_private(path: Path) -> None:
    """Make a file, if it is not there, that nobody else can read: SQLite's own would be as the umask says.

    SQLite gives the files that it puts beside it the same permissions.
    """
    with suppress(OSError):  # it is there, or SQLite will say what is wrong
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
