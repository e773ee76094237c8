import csv
import gzip
import json
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feedback_helpers import row, write_jsonl

from prlhf_lightning.data.readers import Unreadable, read_rows, scan_rows
from prlhf_lightning.errors import FeedbackFormatError

ROWS = [row(i, chosen=f"line one\nand, two {i} é") for i in range(3)]


def as_csv(rows):
    return "user_id,prompt,chosen,rejected\n" + "".join(
        f'{r["user_id"]},{r["prompt"]},"{r["chosen"]}",{r["rejected"]}\n' for r in rows
    )


TEXTS = {
    ".jsonl": "".join(json.dumps(r) + "\n" for r in ROWS),
    ".json": json.dumps(ROWS, indent=2),
    ".csv": as_csv(ROWS),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("suffix", TEXTS)
def test_every_kind_of_text_file_gives_the_same_rows(tmp_path, suffix, gz):
    path = tmp_path / f"votes{suffix}{'.gz' if gz else ''}"
    raw = TEXTS[suffix].encode("utf-8")
    path.write_bytes(gzip.compress(raw) if gz else raw)
    assert [r for _, r in read_rows(path)] == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "votes.parquet")
    items = list(read_rows(tmp_path / "votes.parquet"))
    assert [r for _, r in items] == ROWS
    assert items[2][0] == f"{tmp_path}/votes.parquet:3"


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": 2}\n', [1, 3]),
        ("a.json", '[\n {"x": 1},\n\n {\n  "x": 2\n } ]', ["2, row 1", "4, row 2"]),
        ("a.json", '[{"x": 1}, {"x": 2},\n{"x": 3}]', ["1, row 1", "1, row 2", "2, row 3"]),
        ("a.json", '{"x": 1}\n{"x": 2}', [1, 2]),
        ("a.csv", 'x\n"1\n1"\n2\n', [2, 4]),
    ],
)
def test_rows_are_named_by_the_line_they_start_on(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text)
    assert [where.rsplit(":", 1)[1] for where, _ in read_rows(tmp_path / name)] == [str(n) for n in lines]


def test_a_long_json_array_on_one_line_is_read_in_pieces(tmp_path):
    rows = [row(i, chosen='é\\ "[{' * 500) for i in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert [r for _, r in read_rows(tmp_path / "a.json")] == rows


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffx\n1\n".encode())
    assert next(read_rows(tmp_path / "a.csv"))[1] == {"x": "1"}


def test_an_empty_csv_cell_is_null(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,\n")
    assert next(read_rows(tmp_path / "a.csv"))[1] == {"x": "1", "y": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a\.jsonl:2: broken JSON at column 7 .*; each line must be one"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', r"a\.jsonl:2: is a JSON list; each row must be an object"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', r"a\.jsonl:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: has no rows"),
        ("a.jsonl", b"", r"a\.jsonl: has no rows"),
        ("a.json", b'[{"x": 1},\n{"x" 2}]', r"a\.json:2, row 2: broken JSON"),
        ("a.json", b'[{"x": 1},\n\n{"x": 2}', r"a\.json:3, row 3: the JSON array is cut short here"),
        ("a.json", b'[{"x": 1},\n{"x": "\xff"}]', r"a\.json:2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"x": 1}\n{"x": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: the JSON holds a number too long to read"),
        ("a.jsonl", b'{"x": 1}\n{"x": ' + b"[" * 99999, r"a\.jsonl:2: the JSON is nested too deeply"),
        (
            "a.json",
            b'[{"x": 1},\n{"x": ' + b"9" * 5000 + b"}]",
            r"a\.json:2, row 2: the JSON holds a number too long",
        ),
        ("a.json", b'[{"x": 1},\n{"x": ' + b"[" * 99999, r"a\.json:2, row 2: the JSON is nested too deeply"),
        ("a.json", b'[{"x": 1}\n] [{"x": 2}]', r"a\.json:2: the JSON array ends here, but the file goes on"),
        ("a.json", b'[{"x": 1}] \xc3', r"a\.json: ends in the middle of a UTF-8 character"),
        ("a.json", b"[]", r"a\.json: has no rows"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", r"a\.csv:3: has 3 values but the header names 2 columns"),
        ("a.csv", b"x,y,x\n1,2,3\n", r"a\.csv: column 'x' stands twice \(columns 1 and 3\); rename or remove one"),
        ("a.csv", b'x\n"a" b\n', r"a\.csv:2: broken CSV"),
        ("a.parquet", b"PAR1", r"a\.parquet: is no readable Parquet file"),
        ("a.txt", b"x", r"a\.txt: unknown kind of file; the name must end in \.jsonl"),
        ("a.gz", b"x", r"a\.gz: unknown kind of file"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz:1: the gzip data is damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_line_and_fix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FeedbackFormatError, match=message):
        list(read_rows(tmp_path / name))


def test_a_truncated_gzip_file_names_the_line_where_it_ends(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(i, chosen=f"text {i * 7919}") for i in range(500)])
    whole = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FeedbackFormatError, match=r"b\.jsonl\.gz:\d\d+: the gzip data is damaged or cut short"):
        list(read_rows(tmp_path / "b.jsonl.gz"))


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path, compression):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist([row(i, chosen=f"text {i * 7919}") for i in range(3000)]), path, compression=compression
    )
    whole = path.read_bytes()
    pages = bytearray(whole)
    pages[100 : len(whole) // 2] = b"\xff" * (len(whole) // 2 - 100)
    for damaged in (whole[: len(whole) // 2], bytes(pages)):
        path.write_bytes(damaged)
        with pytest.raises(FeedbackFormatError, match=r"a\.parquet: is no readable Parquet file"):
            list(read_rows(path))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
    monkeypatch.setattr("pathlib.Path.open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(FeedbackFormatError, match=r"a\.jsonl: cannot be read \(.*Permission denied"):
        list(read_rows(path))


def test_a_csv_header_may_follow_blank_lines_and_lack_names(tmp_path):
    (tmp_path / "a.csv").write_text("\nx,,\n1,,\n")
    ((where, values),) = read_rows(tmp_path / "a.csv")
    assert values["x"] == "1"
    assert where.endswith("a.csv:3")


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(FeedbackFormatError, match=r"votes\.jsonl: there is no such file"):
        read_rows(tmp_path / "votes.jsonl")


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "votes.jsonl").mkdir()
    with pytest.raises(FeedbackFormatError, match="is a directory; name the files in it"):
        read_rows(tmp_path / "votes.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_is_refused_and_reading_goes_on(tmp_path, name):
    lines = ['{"x": 1, "x": 2}', '{"x": [{"y": 1, "y": 1}]}', '{"x": 3}']
    path = tmp_path / name
    path.write_text("\n".join(lines) if name == "a.jsonl" else "[" + ",\n".join(lines) + "]")
    with pytest.raises(FeedbackFormatError, match=f"{name}:1(, row 1)?: key 'x' stands twice"):
        list(read_rows(path))
    bad, nested, (_, good) = scan_rows(path)
    assert str(bad[1].error).endswith("remove one of the two.")
    assert "key 'y' stands twice" in str(nested[1].error)
    assert good == {"x": 3}


@pytest.mark.parametrize(
    ("name", "raw", "goes_on"),
    [
        ("a.jsonl", b'{"x": 1}\n{\n\xff\n[1]\n{"x": 2}', True),
        ("a.json", b'[{"x": 1}, [1], {"x": 2}]', True),
        ("a.json", b'[{"x": 1}, {"x" 1}, {"x": 2}]', False),
        ("a.csv", b"x,y\n1,1\n1\n2,2", True),
        ("a.csv", b'x,y\n1,1\n"1"1,\n2,2', False),
        ("a.csv", b"x,y\n1,1\n\xff,1\n2,2", False),
    ],
)
def test_a_scan_goes_on_where_it_can_and_says_where_it_cannot(tmp_path, name, raw, goes_on):
    (tmp_path / name).write_bytes(raw)
    items = [item for _, item in scan_rows(tmp_path / name)]
    assert items[0] == ({"x": 1} if name != "a.csv" else {"x": "1", "y": "1"})
    assert all(isinstance(item, Unreadable) for item in items[1:-1])
    assert isinstance(items[-1], Unreadable) == (not goes_on)
    assert any(isinstance(item, Unreadable) and item.rest for item in items) == (not goes_on)


def test_a_parquet_file_of_fewer_rows_than_it_says_is_refused(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "votes.parquet")
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **_: (b.slice(0, 2) for b in whole(self)))
    with pytest.raises(FeedbackFormatError, match="is damaged after row 2: it should have 3 rows"):
        list(read_rows(tmp_path / "votes.parquet"))


IDS = ["007", "1e3", "null", "yes", "NA", "7.0", "#x"]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n"])
def test_csv_is_read_with_any_separator_and_cells_stay_texts(tmp_path, mark, start):
    rows = [{"user_id": one, "prompt": f"a,b;c\td|e\n{one}", "chosen": 'say "hi"'} for one in IDS]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        file.write(start)
        writer = csv.DictWriter(file, ["user_id", "prompt", "chosen"], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == rows


def test_excels_first_line_names_the_separator_and_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nx,1;y\n1;2\n3;4\n")
    assert list(read_rows(tmp_path / "a.csv"))[1] == (f"{tmp_path}/a.csv:4", {"x,1": "3", "y": "4"})


def test_a_tsv_file_has_tabs_and_any_separator_can_be_named(tmp_path):
    (tmp_path / "a.tsv").write_text("x,y,z\tw\n1\t2\n")
    assert next(read_rows(tmp_path / "a.tsv"))[1] == {"x,y,z": "1", "w": "2"}
    (tmp_path / "a.csv").write_text("x,y,z:w\n1:2\n")
    assert next(read_rows(tmp_path / "a.csv", ":"))[1] == {"x,y,z": "1", "w": "2"}


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_files_of_other_encodings_are_told_with_the_fix(tmp_path, name):
    for encoding, fix in (("utf-16", "is UTF-16"), ("latin-1", "iconv -f WINDOWS-1252 -t UTF-8")):
        (tmp_path / name).write_bytes('[{"x": "é"}]'.encode(encoding))
        with pytest.raises(FeedbackFormatError, match=f"{name}:1: .*{fix}"):
            list(read_rows(tmp_path / name))


def test_keys_that_parquet_adds_to_messages_are_no_part_of_them(tmp_path):
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "1"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"prompt": messages, "note": None}]), tmp_path / "a.parquet")
    assert next(read_rows(tmp_path / "a.parquet"))[1] == {"prompt": messages, "note": None}


def test_a_parquet_file_with_a_damaged_column_name_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user_id": ["ann"], "user_text": ["likes cats"]}), path)
    assert [row for _, row in read_rows(path)] == [{"user_id": "ann", "user_text": "likes cats"}]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"\x09user_text", b"\x09user_tezt", 1))
    with pytest.raises(FeedbackFormatError, match=r"a.parquet: is damaged: a column is called 'user_te.t'"):
        list(read_rows(path))


def test_a_parquet_file_with_columns_left_out_is_read(tmp_path):
    path, table = tmp_path / "a.parquet", pa.table({"user_id": ["ann"], "prompt": ["a"]})
    pq.write_table(table, path)
    kept = pq.read_metadata(path).metadata[b"ARROW:schema"]
    with pq.ParquetWriter(path, table.select(["prompt"]).schema, store_schema=False) as writer:
        writer.write_table(table.select(["prompt"]))
        writer.add_key_value_metadata({"ARROW:schema": kept.decode()})
    assert [row for _, row in read_rows(path)] == [{"prompt": "a"}]
