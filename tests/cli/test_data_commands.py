import errno
import gzip
import json
import os
import sys
from types import ModuleType

import datasets
import pyarrow.parquet as pq
import pytest

from prlhf_lightning.cli import data_convert
from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.errors import FeedbackFormatError


def row(number, **changes):
    return {"user_id": "ann", "prompt": f"p{number}", "chosen": "yes", "rejected": "no", **changes}


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def run(*args):
    """Return the status that a command exits with."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code


def records(path):
    return [parse_record(row, where) for where, row in FileSource(path).rows("train")]


def test_check_shows_problems_writes_json_and_exits_with_1(tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", [row(1), "{", row(2, user_id=None), row(3)])
    assert run("data", "check", "--train", votes, "--output", tmp_path / "out" / "report.json") == 1
    shown = capsys.readouterr().out
    assert "train: 4 rows = 2 accepted + 0 ties + 2 rejected" in shown
    assert f"{votes}:3: field 'user_id' is null (column 'user_id'); fill it or drop the row." in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["splits"]["train"]["rejected"] == 2
    null = next(group for group in report["problems"] if group["kind"] == "user_id: is null")
    assert {name: null["examples"][0][name] for name in ("file", "line", "field", "fix")} == {
        "file": str(votes), "line": 3, "field": "user_id", "fix": "fill it or drop the row",
    }  # fmt: skip


def test_check_of_good_rows_exits_with_0_even_where_it_warns(tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", [row(1), row(1)])
    assert run("data", "check", "--train", votes) == 0
    assert "Errors: 0. Warnings: 2." in capsys.readouterr().out


def test_check_measures_with_a_tokenizer(model_path, tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", [row(i, chosen=" cat" * (3 + i)) for i in range(4)])
    args = ("--train", votes, "--tokenizer", model_path, "--max_completion_length", 5)
    assert run("data", "check", *args) == 0
    assert "chosen: over max_completion_length=5, cut (2)" in capsys.readouterr().out
    assert run("data", "check", *args, "--overlong", "error") == 1


def test_check_takes_shipped_tokenizers_and_names_missing_ones(tmp_path):
    votes = write(tmp_path / "votes.jsonl", [row(1)])
    assert run("data", "check", "--train", votes, "--tokenizer", "builtin:byte-lm") == 0
    assert str(tmp_path / "none") in run("data", "check", "--train", votes, "--tokenizer", tmp_path / "none")


def test_check_and_convert_take_any_source(tmp_path, capsys):
    source = ("--source", "SimulatedSource", "--source.num_users", 4, "--source.pairs_per_user", 3)
    assert run("data", "check", *source) == 0
    assert run("data", "convert", "--output", tmp_path, *source) == 0
    assert "12 rows in = 12 written + 0 rejected" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*")) == ["train.parquet", "validation.parquet"]


def test_a_damaged_file_is_read_as_far_as_possible_and_reported(tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(row(i, chosen=f"{i * 7919}")) + "\n" for i in range(20000)).encode())
    votes = tmp_path / "votes.jsonl.gz"
    votes.write_bytes(whole[: len(whole) // 2])
    assert run("data", "check", "--train", votes, "--examples", 1) == 1
    shown = capsys.readouterr().out
    assert f"reading stopped at {votes}:" in shown
    assert run("data", "convert", "--output", tmp_path / "out", "--train", votes, "--on_error", "report") == 1
    shown = capsys.readouterr().out
    assert "NOT READ TO ITS END" in shown
    (line,) = (tmp_path / "out" / "train.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["rest_unread"]
    assert f"{len(records(tmp_path / 'out' / 'train.parquet')):,} written" in shown


def test_convert_keeps_every_record_here_and_for_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    votes = write(tmp_path / "votes.jsonl", [row(i, user_text="é\0" * (i % 2) or None, extra=i) for i in range(5)])
    assert run("data", "convert", "--output", tmp_path, "--train", votes) == 0
    assert records(tmp_path / "train.parquet") == records(votes)
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train")
    assert loaded.column_names == ["user_id", "prompt", "chosen", "rejected", "user_text"]
    assert loaded["prompt"] == [f"p{i}" for i in range(5)]
    assert pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_changed_byte_of_a_converted_file_is_always_noticed(tmp_path):
    votes = write(tmp_path / "votes.jsonl", [row(i) for i in range(50)])
    assert run("data", "convert", "--output", tmp_path, "--train", votes) == 0
    path = tmp_path / "train.parquet"
    whole, expected = path.read_bytes(), records(path)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    caught = 0
    for place in range(column.total_compressed_size):
        path.write_bytes(b"".join((whole[: 4 + place], bytes([whole[4 + place] ^ 1]), whole[5 + place :])))
        try:
            assert records(path) == expected
        except FeedbackFormatError:
            caught += 1
    assert caught > 30


def test_conversations_become_message_lists_with_their_prompt(tmp_path):
    said = [{"role": "user", "content": "hi"}]
    answers = {name: [*said, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    votes = write(tmp_path / "votes.jsonl", [{"user_id": "ann", **answers}])
    assert run("data", "convert", "--output", tmp_path, "--train", votes) == 0
    assert records(tmp_path / "train.parquet") == records(votes)
    assert pq.read_table(tmp_path / "train.parquet").to_pylist()[0]["prompt"] == said


def test_thumbs_keep_their_columns(tmp_path, capsys):
    thumbs = [{"user_id": "ann", "prompt": "p", "completion": "yes", "label": up} for up in (True, False, "maybe")]
    votes = write(tmp_path / "votes.jsonl", thumbs)
    args = ("--feedback_type", "thumbs", "--train", votes)
    assert run("data", "check", *args) == 1
    shown = capsys.readouterr().out
    assert "label: is neither up nor down (1)" in shown
    assert "contradictory judgments in train (1)" in shown
    assert run("data", "convert", "--output", tmp_path, *args, "--on_error", "report") == 0
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == [{**t, "user_text": None} for t in thumbs[:2]]


def test_texts_and_conversations_do_not_go_into_one_file(tmp_path, capsys):
    messages = {n: [{"role": "assistant", "content": n}] for n in ("chosen", "rejected")}
    votes = write(tmp_path / "votes.jsonl", [row(1), row(2, prompt=[{"role": "user", "content": "hi"}], **messages)])
    assert "a Parquet column has one type" in run("data", "convert", "--output", tmp_path / "out", "--train", votes)
    assert not (tmp_path / "out").exists()


def test_convert_stops_at_the_first_error_and_keeps_old_files(tmp_path):
    votes = write(tmp_path / "votes.jsonl", [row(1)])
    assert run("data", "convert", "--output", tmp_path / "out", "--train", votes) == 0
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    again = ("data", "convert", "--output", tmp_path / "out", "--train", votes)
    assert "exists already" in run(*again)
    write(votes, [row(2), row(3, chosen="")])
    assert f"{votes}:2: field 'chosen' is empty" in run(*again, "--overwrite", "true")
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, recwarn):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    votes = write(tmp_path / "votes.jsonl", [row(i) for i in range(5)])
    said = run("data", "convert", "--output", tmp_path / "out", "--train", votes)
    assert "train.parquet could not be written: No space left on device" in said
    assert not (tmp_path / "out").exists()


def test_rejected_rows_are_written_aside_until_there_are_none(tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", [row(1), row(2, rejected="yes"), "[" * 3000, row(3)])
    command = ("data", "convert", "--output", tmp_path, "--train", votes, "--on_error", "report", "--overwrite", "true")
    assert run(*command) == 0
    assert "4 rows in = 2 written + 2 rejected" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "train.rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [2, 3]
    assert lines[0]["row"] == row(2, rejected="yes")
    write(votes, [row(1)])
    assert run(*command) == 0
    assert not (tmp_path / "train.rejected.jsonl").exists()


def test_without_a_good_row_the_first_reason_is_the_error(tmp_path):
    votes = write(tmp_path / "votes.jsonl", [row(1, chosen=""), "{"])
    for path, reason in ((votes, "votes.jsonl:1: field 'chosen' is empty"), (tmp_path / "none.csv", "no such file")):
        said = run("data", "convert", "--output", tmp_path / "out", "--train", path, "--on_error", "report")
        assert "no good row" in said
        assert reason in said
    assert not (tmp_path / "out").exists()


def test_columns_that_are_not_converted_are_named(tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", [{**row(1), "worker": "bob", "stars": 5}])
    args = ("--output", tmp_path, "--train", votes, "--columns", "{user_id: worker}")
    assert run("data", "convert", *args) == 0
    assert "columns not converted: 'user_id', 'stars'" in capsys.readouterr().out
    assert records(tmp_path / "train.parquet")[0].user_id == "bob"


def test_rows_are_written_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(data_convert, "_GROUP_ROWS", 3)
    votes = write(tmp_path / "votes.jsonl", [row(i) for i in range(8)])
    assert run("data", "convert", "--output", tmp_path, "--train", votes) == 0
    file = pq.ParquetFile(tmp_path / "train.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [3, 3, 2]
    assert records(tmp_path / "train.parquet") == records(votes)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "train: give a file"),
        (("--source", "SimulatedSource", "--train", "a.jsonl"), "give either files"),
        (("--validation", "a.jsonl"), "train: give a file"),
    ],
)
@pytest.mark.parametrize("command", [("check",), ("convert", "--output", "out")])
def test_a_source_is_named_in_one_way(command, args, says):
    assert says in run("data", *command, *args)


class Mentions:
    """A score whose settings stand in the configuration."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, prompt: str, answer: str) -> float:
        return float(answer.count(self.word))


def test_a_pool_with_scores_of_another_package_is_converted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_scores", module := ModuleType("my_scores"))
    module.Mentions, module.negated = Mentions, lambda prompt, answer: -len(answer)
    monkeypatch.setattr(Mentions, "__module__", "my_scores")
    pool = write(tmp_path / "pool.jsonl", [{"prompt": f"q{i}", "responses": ["x", "xyz", "yy"]} for i in range(20)])
    settings = {
        "pool": str(pool),
        "groups": [{"brief": 1}, {"y": 1}],
        "scores": {"brief": "my_scores.negated", "y": {"class_path": "my_scores.Mentions", "init_args": {"word": "y"}}},
        "num_users": 4, "votes_per_user": 8, "num_unseen_users": 0, "validation_votes_per_user": 3, "temperature": 1e-6,
    }  # fmt: skip
    source = json.dumps({"class_path": "PoolSource", "init_args": settings})
    assert run("data", "convert", "--output", tmp_path, "--source", source) == 0
    likes = {"brief": lambda text: -len(text), "y": lambda text: text.count("y")}
    kept = {record.user_id: set(likes) for record in records(tmp_path / "train.parquet")}
    for r in records(tmp_path / "train.parquet"):
        kept[r.user_id] -= {name for name, like in likes.items() if like(r.chosen) < like(r.rejected)}
    assert sorted(map(sorted, kept.values())) == [["brief"], ["brief"], ["y"], ["y"]]
