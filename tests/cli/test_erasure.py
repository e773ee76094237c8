"""Whatever still names people who were erased is told: other files, in any format, wherever they lie."""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import json
import lzma
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from prlhf_lightning.cli import users
from prlhf_lightning.cli.main import main
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import FORMAT, KEY, users_of
from prlhf_lightning.utils.cache_dir import default_cache_dir
from prlhf_lightning.utils.io import escape_cell

TABLE = "user_model.table.weight"
ODD = ['say "hi", ann', "a\nb", " x ", "=cmd", "carla-ñandú-🦤", "O'Neil <o@x.org>", "a/b", "back\\slash", "tab\there"]


def save(path: Path, user_ids, **more) -> Path:
    """Write a checkpoint with these users: no model is needed for one."""
    table = torch.arange(4.0 * (1 + len(user_ids))).reshape(-1, 4) + 0.5
    state = {"exp_avg": 2 * table, "exp_avg_sq": 3 * table, "row_steps": torch.ones(len(table))}
    groups = [{"name": "user_tables", "params": [0]}]
    entry = {"format": FORMAT, "users": list(user_ids), "new_rows": {TABLE: table[0].clone()}, "shares": []}
    content = {"state_dict": {TABLE: table}, "optimizer_states": [{"state": {0: state}, "param_groups": groups}]}
    checkpoint_files.save({**content, KEY: entry, **more}, path)
    return path


def known_by(path: Path) -> list[str]:
    return list(users_of(checkpoint_files.load(path)).ids)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of these people, among others."""
    folder = tmp_path / "runs/version_0"
    save(folder / "checkpoints/last.ckpt", ["bob", *ODD, "ann", "1", "annabel", "zoe"])
    (folder / "config.yaml").write_text("")
    return folder


def erase(run: Path, *user_ids: str, **options) -> None:
    users.remove(run, list(user_ids), all=True, **options)


def as_csv(path: Path, user_id: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["user_id", "note"], [escape_cell(user_id), 'a "note"']])


def as_compressed(opened):
    def write(path: Path, user_id: str) -> None:
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps({"user_id": user_id}) + "\n" + "x" * 100)

    return write


def as_zip(path: Path, user_id: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("predictions.jsonl", 20 * json.dumps({"user_id": user_id}))


def as_sqlite(path: Path, user_id: str) -> None:
    """A row that was deleted stays in a free page, or in the write-ahead log."""
    with closing(sqlite3.connect(path)) as log:
        log.execute("PRAGMA journal_mode=WAL")
        log.execute("PRAGMA secure_delete=0")
        log.execute("CREATE TABLE feedback (user_id TEXT, prompt TEXT)")
        log.execute("INSERT INTO feedback VALUES (?, 'a')", [user_id])
        log.commit()
        log.execute("DELETE FROM feedback")
        log.commit()


def as_parquet(path: Path, user_id: str) -> None:
    rows = pa.table({"who": [[{"user": user_id, "n": 1}]] * 99})
    pq.write_table(rows, path, compression="zstd")


def as_arrow(path: Path, user_id: str) -> None:
    rows = pa.table({"user_id": pa.array(["zed", user_id] * 9).dictionary_encode()})
    with pa.ipc.new_stream(str(path), rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)


FORMATS = {
    "users_seen.csv": as_csv,
    "predictions.jsonl": lambda path, user_id: path.write_text(json.dumps({"user_id": user_id}, ensure_ascii=False)),
    "report.json": lambda path, user_id: path.write_text(json.dumps({user_id: 1})),
    "chat.json": lambda path, user_id: path.write_text(json.dumps({"rows": json.dumps({"user_id": user_id})})),
    "page.html": lambda path, user_id: path.write_text(f"<td>{html.escape(user_id)}</td>"),
    "links.txt": lambda path, user_id: path.write_text(f"GET /v1/users?id={quote(user_id, safe='')}&n=1"),
    "seen.utf16.csv": lambda path, user_id: path.write_text(f"{user_id}\t0.5", encoding="utf-16"),
    "answers.jsonl.gz": as_compressed(gzip.open),
    "answers.jsonl.bz2": as_compressed(bz2.open),
    "answers.jsonl.xz": as_compressed(lzma.open),
    "old.zip": as_zip,
    "feedback.db": as_sqlite,
    "convert.parquet": as_parquet,
    "rows.arrow": as_arrow,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("user_id", ODD)
def test_a_file_that_names_a_person_is_told_in_any_format(run, capsys, name, user_id):
    FORMATS[name](run / name, user_id)
    erase(run, user_id)
    assert f"{run / name} names " in capsys.readouterr().out
    assert user_id not in known_by(run / "checkpoints/last.ckpt")


def test_logs_of_tensorboard_are_searched(run, capsys):
    with SummaryWriter(str(run)) as writer:
        writer.add_text("sample", "for carla-ñandú-🦤: a dog")
    erase(run, "carla-ñandú-🦤")
    assert "events.out.tfevents" in capsys.readouterr().out


def test_ids_that_contain_an_erased_id_are_left_alone(run, capsys):
    (run / "users_seen.csv").write_text("user_id,accuracy\nannabel,0.51\njoanna,0.21\n21,0.2\n")
    erase(run, "ann", "1")
    assert "users_seen.csv" not in capsys.readouterr().out


def test_every_place_beside_a_run_is_searched_or_named(run, tmp_path, capsys):
    runs = run.parent
    named = [
        run / ".predictions.jsonl.partial",
        run / "exported/peft_users/x/adapter_config.json",
        runs / "report.html",
        runs / "version_1/predictions.jsonl",
        runs / "mlruns/0/params/user",
        runs / "study/version_0/users_seen.csv",
        default_cache_dir() / "0f/rows.json",
        tmp_path / "data/votes.jsonl",
    ]
    for path in named:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"user_id": "zoe"}')
    save(runs / "shrunk.ckpt", ["zoe"])
    save(tmp_path / "disk/checkpoints/best.ckpt", ["zoe"])
    for folder in ("version_1", "study/version_0"):
        (runs / folder / "config.yaml").write_text("")
    (runs / "linked").mkdir()
    (runs / "linked/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    (runs / "notes").mkdir()
    erase(run, "zoe", also_search=[tmp_path / "data"])
    said = capsys.readouterr().out
    assert not [path for path in named if f"{path} names zoe" not in said and f"{path}, " not in said]
    assert f"{runs / 'shrunk.ckpt'} still holds zoe" in said
    assert f"{runs / 'linked/checkpoints/best.ckpt'} still holds zoe" in said
    assert f"Not searched: {runs / 'notes'};" in said


def test_files_beside_a_checkpoint_of_no_run_are_searched(tmp_path, capsys):
    save(tmp_path / "shrunk.ckpt", ["zoe", "bob"])
    save(tmp_path / "adapted.ckpt", ["zoe"])
    (tmp_path / "answers.jsonl").write_text('{"user_id": "zoe"}')
    users.remove(tmp_path / "shrunk.ckpt", "zoe")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'adapted.ckpt'} still holds zoe" in said
    assert f"{tmp_path / 'answers.jsonl'} names zoe" in said


def test_a_run_is_found_through_links(run, tmp_path, capsys):
    (run / "users_seen.csv").write_text("zoe,0.5")
    (run / "checkpoints/newest.ckpt").symlink_to("last.ckpt")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "model.ckpt").symlink_to(run / "checkpoints/last.ckpt")
    erase(tmp_path / "link", "zoe")
    assert "users_seen.csv names zoe" in capsys.readouterr().out
    users.remove(tmp_path / "model.ckpt", "bob")
    assert (run / "checkpoints/newest.ckpt").is_symlink()
    assert {"zoe", "bob"}.isdisjoint(known_by(run / "checkpoints/newest.ckpt"))


def test_what_can_not_be_looked_into_as_a_whole_is_told(run, capsys):
    (run / "a.jsonl.gz").write_bytes(gzip.compress(b'"zoe"' + bytes(range(256)) * 999)[:-99])
    (run / "b.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99))
    erase(run, "zoe")
    said = capsys.readouterr().out
    assert f"{run / 'b.7z'} was not searched completely: it is compressed (7z)" in said
    assert f"{run / 'a.jsonl.gz'} was not searched completely" in said


def test_many_users_are_erased_at_once_with_a_short_result(run, tmp_path, capsys):
    everyone = [f"user-{number}" for number in range(300)]
    last = save(run / "checkpoints/last.ckpt", everyone)
    before = checkpoint_files.load(last)["state_dict"][TABLE]
    (tmp_path / "ids.txt").write_text("\n".join(everyone[1::2]))
    main(["users", "remove", "--model", str(run), "--user_file", str(tmp_path / "ids.txt"), "--all", "true"])
    said = capsys.readouterr().out
    assert "130 others and 390 vectors: nothing left" in said
    assert len(said.splitlines()) < 30
    assert known_by(last) == everyone[::2]
    assert torch.equal(checkpoint_files.load(last)["state_dict"][TABLE], before[[0, *range(1, 301, 2)]])


def test_a_command_that_was_killed_goes_on(run, tmp_path, monkeypatch, capsys):
    best = save(run / "checkpoints/best.ckpt", ["zoe", "bob"])
    last, save_file = run / "checkpoints/last.ckpt", checkpoint_files.save

    def killed(content, path, **kwargs):
        save_file(content, path, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            erase(run, "zoe", "ann")
    assert ("zoe" in known_by(best)) != ("zoe" in known_by(last))  # one of two is done
    with pytest.raises(SystemExit, match="`--skip_unknown true` goes on without"):
        main(["users", "remove", "--model", str(run), "--all", "true", "--user", "zoe", "ann", "none"])
    (run / "a.csv").write_text("none")
    erase(run, "zoe", "ann", "none", skip_unknown=True)
    assert {"zoe", "ann"}.isdisjoint([*known_by(best), *known_by(last)])
    assert f"{run / 'a.csv'} names none" in capsys.readouterr().out


def test_ids_with_line_breaks_are_given_in_a_list(run, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(["a\nb", " x "]))
    main(["users", "remove", "--model", str(run), "--all", "true", "--user_file", str(tmp_path / "ids.json")])
    assert {"a\nb", " x "}.isdisjoint(known_by(run / "checkpoints/last.ckpt"))


def test_hashed_ids_are_erased_by_the_ids_of_the_data(run, monkeypatch, capsys):
    monkeypatch.setenv("SALT", "x" * 16)
    pseudonym = Pseudonyms(b"x" * 16)("zoe")
    last = save(run / "checkpoints/last.ckpt", ["bob", pseudonym])
    (run / "users_seen.csv").write_text(pseudonym)
    (run / "feedback.jsonl").write_text('"zoe"')
    erase(run, "zoe", hash_user_ids_with="SALT")
    said = capsys.readouterr().out
    assert f"users_seen.csv names {pseudonym}" in said
    assert "feedback.jsonl names zoe" in said
    assert known_by(last) == ["bob"]


def test_ids_that_look_alike_and_stay_are_told(run, capsys):
    save(run / "checkpoints/last.ckpt", ["e\u0301", "\u00e9", "Zoe", "zoe ", "zoe"])
    erase(run, "zoe", "\u00e9")
    assert "Remaining ids that look similar: 'Zoe', 'zoe ', " in capsys.readouterr().out


def test_an_unknown_place_that_names_a_person_is_reported(run, capsys):
    other = save(run.parent / "version_1/checkpoints/last.ckpt", ["bob"], notes={"favorite": "zoe"})
    erase(run, "zoe")
    assert f"{other} names zoe in a place not known to this tool" in capsys.readouterr().out
