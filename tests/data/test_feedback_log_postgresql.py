"""The log of feedback in PostgreSQL: what happens to a database happens to real ones here."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from prlhf_lightning.data import feedback_log
from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog, FeedbackLogError
from prlhf_lightning.errors import ConfigurationError

psycopg = pytest.importorskip("psycopg", reason="psycopg, of the extra postgres, is not installed")


def pair(number=0):
    return Feedback("key", str(number), 0.0, "ann", "a cat", chosen="yes", rejected="no")


@contextmanager
def admin(url):
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection.execute


@pytest.fixture
def frozen(postgres):
    """Stop all processes of the server, so that it says nothing; go on at the end."""
    stopped = []

    def freeze():
        stopped.extend(postgres.processes())
        for process in stopped:
            os.kill(process, signal.SIGSTOP)

    def thaw():
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)

    freeze.thaw = thaw
    yield freeze
    thaw()


def test_a_database_that_hangs_holds_up_nothing_for_long(postgres_url, frozen, monkeypatch):
    monkeypatch.setattr(feedback_log, "_SILENT_SECONDS", 0.3)
    log = FeedbackLog(f"{postgres_url}?connect_timeout=2")
    log.append(pair())
    frozen()

    def fails(call):
        started = time.monotonic()
        with pytest.raises(FeedbackLogError, match=r"no connection|does not answer"):
            call()
        return time.monotonic() - started

    calls = (lambda: log.append(pair(1)), log.check, lambda: FeedbackLog(f"{postgres_url}?connect_timeout=2"))
    with ThreadPoolExecutor() as pool:
        assert max(pool.map(fails, calls)) < 8
    frozen.thaw()
    assert log.append(pair(1))
    log.check()
    assert log.extent().rows == 2


def test_a_database_that_was_started_again_is_found_again(postgres_url, postgres):
    log = FeedbackLog(postgres_url)
    log.append(pair())
    postgres.stop("immediate")
    for call in (lambda: log.append(pair(1)), log.check):
        with pytest.raises(FeedbackLogError, match="connection"):
            call()
    postgres.start()
    assert [log.append(pair()), log.append(pair(1))] == [False, True]
    log.check()


def test_a_vote_does_not_fail_because_idle_connections_were_cut(postgres_url):
    log = FeedbackLog(postgres_url)
    log.append(pair())
    with admin(postgres_url) as execute:
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()")  # fmt: skip
    assert log.append(pair(1))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("LOCK TABLE prlhf_feedback IN SHARE MODE", "locked"),
        ("DROP TABLE prlhf_feedback", "restore it"),
        ("ALTER TABLE prlhf_feedback DROP COLUMN liked", "not of this version"),
    ],
)
def test_a_check_tells_what_keeps_feedback_from_being_written(postgres_url, fault, says, monkeypatch):
    monkeypatch.setattr(feedback_log, "_LOCKED_MS", 200)
    log = FeedbackLog(postgres_url)
    with psycopg.connect(postgres_url) as other:
        other.execute(fault)
        if "LOCK" not in fault:
            other.commit()
        for call in (log.check, lambda: log.append(pair())):
            with pytest.raises(FeedbackLogError, match=says):
                call()


def test_a_database_that_takes_no_writes_is_not_ready(postgres_url):
    log = FeedbackLog(postgres_url)
    log.check()
    with admin(postgres_url) as execute:
        execute(f"ALTER DATABASE {postgres_url.rsplit('/', 1)[1]} SET default_transaction_read_only = on")
    with pytest.raises(FeedbackLogError, match="takes no writes"):
        log.check()


def test_a_trial_leaves_no_row(postgres_url):
    log = FeedbackLog(postgres_url)
    log.append(pair())
    log.check()
    assert log.extent().rows == 1


def test_feedback_is_on_disk_even_with_synchronous_commit_off(postgres_url):
    with admin(postgres_url) as execute:
        execute(f"ALTER DATABASE {postgres_url.rsplit('/', 1)[1]} SET synchronous_commit = off")
    log = FeedbackLog(postgres_url)
    with log._connection(1) as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "off"
        connection.execute(feedback_log._DURABLY, {"ms": "1000"})
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("UNLOGGED TABLE prlhf_feedback", "SET LOGGED"),
        ("TABLE prlhf_feedback", "no column"),
    ],
)
def test_a_table_that_cannot_keep_the_log_is_refused(postgres_url, table, says):
    columns = ", ".join(f"{column.name} text" for column in feedback_log.FEEDBACK.c)
    with admin(postgres_url) as execute:
        execute(f"CREATE {table} ({columns if 'UNLOGGED' in table else 'number bigint'})")
    with pytest.raises(ConfigurationError, match=says):
        FeedbackLog(postgres_url)


def test_a_database_that_cannot_store_every_letter_is_refused(postgres):
    latin = postgres.new_database("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(ConfigurationError, match="ENCODING 'UTF8'"):
        FeedbackLog(latin)


@pytest.mark.parametrize(
    "name", ["é" * 128, "e\u0301", " x ", "\u202e\ufeff", "'; DROP TABLE prlhf_feedback; --", "😀"]
)
def test_odd_ids_are_kept_letter_by_letter(postgres_url, name):
    log = FeedbackLog(postgres_url)
    odd = Feedback("key", name, 0.0, name, "a cat", chosen="x" * 1_000_000, rejected="no")
    assert [log.append(odd), log.append(odd)] == [True, False]
    assert log.newest_pairs(name, 1)[0]["user_id"] == name
