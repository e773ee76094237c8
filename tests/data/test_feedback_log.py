"""The log of feedback: what was acknowledged is there, once, and training can read it."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import sqlalchemy as sql

from prlhf_lightning.data import FeedbackLogSource, FeedbackRecord, PreferenceDataModule
from prlhf_lightning.data.feedback_log import FEEDBACK, ConflictError, Feedback, FeedbackLog, FeedbackLogError
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/feedback.db"
    return request.getfixturevalue("postgres_url")


def pair(number=0, user="ann", **more):
    return Feedback("key", str(number), 0.0, user, **{"prompt": "a cat", "chosen": "yes", "rejected": "no"} | more)


def test_feedback_is_kept_once(url):
    log = FeedbackLog(url)
    assert [log.append(pair()), log.append(pair()), log.append(pair(1))] == [True, False, True]
    with pytest.raises(ConflictError, match="'0' stands for other feedback"):
        log.append(pair(chosen="perhaps"))
    assert FeedbackLog(url).extent() == (2, log.extent().last)


def test_a_new_file_is_its_owners_alone(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.append(pair())
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("feedback.db", "feedback.db-wal", "feedback.db-shm"), 0o600
    )


def test_pairs_come_as_training_reads_them(url):
    log = FeedbackLog(url)
    messages = [{"role": "user", "content": "a cat"}]
    thumb = Feedback("", "t", 0.0, "ann", "a cat", completion="yes", liked=True)
    for feedback in (
        pair(1),
        pair(2, rejected="yes"),
        thumb,
        pair(3, user="zoë", prompt=messages, user_text="likes 李"),
    ):
        log.append(feedback)
    rows = [row for _, row in FeedbackLogSource(url).rows("train")]
    assert rows[0] == {"user_id": "ann", "user_text": None, "prompt": "a cat", "chosen": "yes", "rejected": "no"}
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    assert rows[1:] == [
        {"user_id": "zoë", "user_text": "likes 李", "prompt": messages, "chosen": answers[0], "rejected": answers[1]}
    ]
    assert [row["user_id"] for row in log.newest_pairs("zoë", 5)] == ["zoë"]
    thumbs = [
        parse_record(row, "here", feedback="thumbs") for _, row in FeedbackLogSource(url, thumbs=True).rows("train")
    ]
    assert thumbs == [FeedbackRecord("ann", "a cat", "yes", thumb=True)]


def test_of_a_user_the_newest_pairs_are_read(url):
    log = FeedbackLog(url)
    for number in range(9):
        log.append(pair(number, "ann" if number % 2 else "bob", chosen=f"answer {number}"))
    log.append(pair(9, chosen="no"))  # a tie
    assert [row["chosen"] for row in log.newest_pairs("ann", 3)] == ["answer 3", "answer 5", "answer 7"]


def test_two_processes_may_make_the_table_at_once(tmp_path):
    url, others = str(tmp_path / "feedback.db"), []
    sql.event.listen(FEEDBACK, "before_create", lambda *_, **__: others or others.append(1) or FeedbackLog(url))
    assert FeedbackLog(url).append(pair())
    assert others


def test_rows_become_visible_in_the_order_of_their_numbers(url):
    slow, quick = FeedbackLog(url), FeedbackLog(url)
    sql.event.listen(slow._engine, "commit", lambda _: time.sleep(0.5))
    thread = Thread(target=slow.append, args=(pair(0),))
    thread.start()
    time.sleep(0.2)
    quick.append(pair(1))
    assert quick.extent().rows == 2
    thread.join()


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", ":memory:"])
def test_a_log_in_memory_is_refused(address):
    with pytest.raises(ConfigurationError, match="in memory would be lost"):
        FeedbackLog(address)


def test_many_threads_write_at_once(url):
    logs = [FeedbackLog(url) for _ in range(2)]
    threads = [Thread(target=logs[i % 2].append, args=(pair(i % 20),)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logs[0].extent().rows == 20


def test_a_run_can_be_repeated_though_the_log_has_grown(url):
    log = FeedbackLog(url)
    log.append(pair(0))
    early, late = FeedbackLogSource(url), FeedbackLogSource(url, until=log.extent().last)
    fingerprint = early.fingerprint("train")
    log.append(pair(1))
    assert fingerprint == early.fingerprint("train") == late.fingerprint("train")
    assert len(list(early.rows("train"))) == len(list(late.rows("train"))) == 1
    assert FeedbackLogSource(url).fingerprint("train") != fingerprint


def test_training_reads_a_log(tmp_path, model_path):
    url = str(tmp_path / "feedback.db")
    log = FeedbackLog(url)
    for i in range(12):
        log.append(pair(i, user="ann" if i % 2 else "bob", prompt=f"a cat {' ran' * i}"))
    data = PreferenceDataModule(FeedbackLogSource(url), model_path, validation_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    assert data.num_users == 3
    batches = [batch for loader in (data.train_dataloader(), *data.val_dataloader()) for batch in loader]
    assert sum(map(len, batches)) == 12


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere/feedback.db", "no feedback log nowhere/feedback.db"),
        ("mysql+nothing://x/y", "can't be used"),
        ("a:b://c", "write sqlite:///file.db or postgresql://"),
    ],
)
def test_a_log_that_is_not_there_is_named(url, says):
    with pytest.raises(ConfigurationError, match=says):
        list(FeedbackLogSource(url).rows("train"))


def test_an_empty_log_says_so(tmp_path):
    url = str(tmp_path / "feedback.db")
    FeedbackLog(url)
    with pytest.raises(FeedbackFormatError, match="has no pairs yet"):
        list(FeedbackLogSource(url).rows("train"))


def test_errors_do_not_repeat_what_was_written(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log._engine.connect().exec_driver_sql("DROP TABLE prlhf_feedback").connection.commit()
    with pytest.raises(FeedbackLogError, match="can't be used now") as caught:
        log.append(pair(chosen="secret"))
    assert "secret" not in str(caught.value)


WRITER = """
import sys
from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog
log = FeedbackLog(sys.argv[1])
for number in range(int(sys.argv[2]), 10**6):
    log.append(Feedback("", str(number), 0.0, "ann", "p", chosen="yes", rejected="no"))
    print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path):
    url, acknowledged = str(tmp_path / "feedback.db"), set()
    for attempt in range(4):
        command = [sys.executable, "-c", WRITER, url, str(1000000 * attempt // 4)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            acknowledged.add(process.stdout.readline().strip())  # it is writing now
            time.sleep(random.Random(attempt).uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            acknowledged |= set(process.stdout.read().split("\n")[:-1])
    kept = {str(row["id"]) for row in _rows(url)}
    assert acknowledged <= kept
    assert len(kept - acknowledged) <= 4  # the one being acknowledged at each kill


def _rows(url):
    with FeedbackLog(url)._engine.connect() as connection:
        return connection.exec_driver_sql("SELECT id FROM prlhf_feedback").mappings().all()


def _delete(file):
    for path in file.parent.glob("feedback.db*"):
        path.unlink()


def _move(file):
    file.rename(file.with_name("moved.db"))


def _damage(file):
    content = bytearray(file.read_bytes())
    content[4096:] = bytes(255 for _ in content[4096:])  # all pages but the first
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("accident", "says"), [(_delete, "Operational|gone"), (_move, "gone"), (_damage, "damaged|Database")]
)
def test_a_file_that_is_not_what_it_was_takes_no_feedback(tmp_path, accident, says):
    file = tmp_path / "feedback.db"
    log = FeedbackLog(str(file))
    log.append(pair())
    log.close()  # which writes all pages to the file itself
    log.check()
    accident(file)
    with pytest.raises(FeedbackLogError, match=says):
        log.append(pair(1))
    with pytest.raises(FeedbackLogError):
        log.check()
    assert accident is _damage or not file.exists()  # no empty one in its place


@pytest.mark.parametrize("end", ["-wal", "-shm"])
@pytest.mark.parametrize("opened_by_another", [False, True])
def test_acknowledged_votes_survive_a_deleted_side_file(tmp_path, end, opened_by_another):
    file = tmp_path / "feedback.db"
    log = FeedbackLog(str(file))
    log.append(pair())
    (tmp_path / f"feedback.db{end}").unlink()
    read = "import sqlite3,sys; sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM prlhf_feedback').fetchone()"
    if opened_by_another:  # makes a new one, which this process does not write to
        other = f"{read}; input()"
        process = subprocess.Popen([sys.executable, "-c", other, str(file)], stdin=subprocess.PIPE)
        while not (tmp_path / f"feedback.db{end}").exists():
            time.sleep(0.01)
        process.communicate(b"\n")
    for _ in range(3):
        with suppress(FeedbackLogError):
            assert log.append(pair(1)) is not None
            break
    assert {str(row["id"]) for row in _rows(str(file))} == {"0", "1"}


def test_a_file_that_was_put_back_is_written_to(tmp_path):
    file, kept = tmp_path / "feedback.db", tmp_path / "kept.db"
    log = FeedbackLog(str(file))
    log.append(pair())
    log.close()
    kept.write_bytes(file.read_bytes())
    log.append(pair(1))
    _delete(file)
    with pytest.raises(FeedbackLogError):
        log.append(pair(2))
    kept.rename(file)
    assert log.append(pair(2))
    log.check()
    assert FeedbackLog(str(file)).extent().rows == 2


def test_a_replaced_file_is_opened_anew(tmp_path):
    file, other = tmp_path / "feedback.db", tmp_path / "other.db"
    log = FeedbackLog(str(file))
    log.append(pair())
    FeedbackLog(str(other)).close()
    other.replace(file)
    for _ in range(2):  # SQLite would write the rows of the old file's -wal into the new one
        with pytest.raises(FeedbackLogError, match="-wal is that of the file before"):
            log.append(pair(1, chosen="new"))
    for end in ("-wal", "-shm"):
        file.with_name(f"feedback.db{end}").unlink()
    assert log.append(pair(1, chosen="new"))
    assert log.extent() == (1, 1)
    with closing(sqlite3.connect(file)) as found:
        assert ("new",) in found.execute("SELECT chosen FROM prlhf_feedback").fetchall()


@pytest.mark.parametrize("emptied", [False, True])
def test_votes_in_a_wal_without_its_file_survive_a_new_start(tmp_path, emptied):
    file, kept = tmp_path / "feedback.db", tmp_path / "kept.db"
    log = FeedbackLog(str(file))
    log.append(pair())
    file.rename(kept)
    if emptied:
        file.touch()
    with pytest.raises(FeedbackLogError, match="-wal"):
        FeedbackLog(str(file))
    kept.replace(file)
    assert FeedbackLog(str(file)).extent().rows == 1


def test_a_damaged_index_is_noticed(tmp_path):
    file = tmp_path / "feedback.db"
    log = FeedbackLog(str(file))
    log.append(pair(user="somebody"))
    log.close()
    content = file.read_bytes()
    at = [match.start() for match in re.finditer(b"somebody", content)]
    assert len(at) == 2  # in the table, and in its index
    file.write_bytes(content[: at[0]] + b"somebodx" + content[at[0] + 8 :])
    with pytest.raises(FeedbackLogError, match="damaged"):
        log.append(pair(1))


def test_a_reader_notices_what_no_row_tells(tmp_path):
    """Such as a row that is missing, or that has another row's number."""
    file = tmp_path / "feedback.db"
    log = FeedbackLog(str(file))
    log.append(pair(user="somebody"))
    log.close()
    content = file.read_bytes()
    at = content.rindex(b"somebody")  # in the index, which comes after the table
    file.write_bytes(content[:at] + b"somebodx" + content[at + 8 :])
    with pytest.raises(FeedbackLogError, match="damaged"):
        list(FeedbackLog(str(file), create=False).pairs())


def test_a_damaged_name_in_the_table_is_one_error(tmp_path):
    file = tmp_path / "feedback.db"
    FeedbackLog(str(file)).close()
    content = file.read_bytes()
    damaged = content.replace(b"tableprlhf_feedback", b"tableprlhf_feedba\xe3k")
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(FeedbackLogError, match="a text in it is damaged"):
        list(FeedbackLog(str(file), create=False).pairs())


def test_a_row_with_a_damaged_prompt_is_named_and_how_to_go_on(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.append(pair())
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("UPDATE prlhf_feedback SET prompt = 'secret', digest = NULL")  # as of an older version
    with pytest.raises(FeedbackLogError, match=r"feedback.db is damaged: row 1 .*JSON.*DELETE FROM") as caught:
        list(log.pairs())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "chosen = 'no!'",
        "chosen = rejected",
        "chosen = NULL, rejected = NULL",
        "chosen = x'ff'",
        "received = 9",
        "user_id = 'bob'",
        "digest = ''",
        "liked = true, digest = NULL",
    ],
)
def test_a_row_that_changed_on_the_disk_is_refused(url, change):
    if "x'ff'" in change and "sqlite" not in url:
        pytest.skip("PostgreSQL keeps text apart from bytes")
    log = FeedbackLog(url)
    log.append(pair(1))
    log.append(pair(2))
    with log._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE prlhf_feedback SET {change} WHERE id = '2'")
    rows = log.pairs()
    assert next(rows)[1]["chosen"] == "yes"
    with pytest.raises(FeedbackLogError, match=r"damaged: row \d+ does not have the values"):
        next(rows)
    with pytest.raises(FeedbackLogError, match="damaged"):
        log.append(pair(2))
    with pytest.raises(FeedbackLogError, match="damaged"):
        log.newest_pairs("bob" if "bob" in change else "ann", 5)


def test_a_log_without_digests_is_read_and_later_has_them(url):
    log = FeedbackLog(url)
    log.append(pair(1))
    with log._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE prlhf_feedback DROP COLUMN digest")
    log.close()
    assert len(list(FeedbackLog(url, create=False).pairs())) == 1
    log = FeedbackLog(url)
    assert [log.append(pair(1)), log.append(pair(2))] == [False, True]
    with log._engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT digest IS NULL FROM prlhf_feedback ORDER BY number").scalars().all()
    assert [bool(is_missing) for is_missing in found] == [True, False]
    assert len(list(log.pairs())) == 2


def test_text_that_is_no_longer_utf_8_is_not_quoted(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.append(pair())
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("UPDATE prlhf_feedback SET chosen = CAST(x'736563726574ff' AS TEXT)")
    with pytest.raises(FeedbackLogError) as caught:
        list(log.pairs())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("ext4", False)])
def test_a_file_on_a_network_file_system_is_warned_of(tmp_path, monkeypatch, caplog, kind, warned):
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path.parent} {kind} rw 0 0\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: mounts if str(self) == "/proc/self/mounts" else read(self))
    FeedbackLog(str(tmp_path / "feedback.db"))
    assert ("PostgreSQL for several" in caplog.text) == warned


def test_a_locked_file_is_not_ready(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(FeedbackLogError, match="locked"):
            log.check()
        other.execute("ROLLBACK")
    log.check()


def test_a_full_disk_is_not_ready(tmp_path, monkeypatch):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.check()
    full = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(FeedbackLogError, match="full"):
        log.check()


def test_a_trial_changes_nothing(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.append(pair())
    for _ in range(3):
        log.check()
    assert list(log.pairs()) == list(FeedbackLog(log.name).pairs())
    assert log.extent() == (1, 1)
