"""Files of feedback with anything wrong, drawn by hypothesis."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from feedback_helpers import row
from hypothesis import strategies as st

# Two completions of four words may be equal as texts, only as tokens (unknown words), or only once cut, or too long.
WORD = st.sampled_from(["one", "two", "three", "unheard", "of"])
TEXT = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
GOOD = st.builds(row, st.integers(0, 99), st.sampled_from(["ann", "bob"]), chosen=TEXT, rejected=TEXT, user_text=TEXT)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
FIELDS = ["user_id", "prompt", "chosen", "rejected", "user_text", "x"]
ODD = st.one_of(
    st.builds(lambda good, field, value: {**good, field: value}, GOOD, st.sampled_from(FIELDS), VALUES),
    st.dictionaries(st.sampled_from(FIELDS), VALUES),
    VALUES,
).map(json.dumps)
HUGE = st.sampled_from(
    ['{"user_id": ' + "7" * 5000 + "}", '{"user_id": ' + "[" * 5000, '{"x": ' + "[" * 980 + "]" * 980]
)
BLANK = st.sampled_from(["", " ", "\t", "\r"])
GOOD_LINES = st.lists(GOOD.map(json.dumps) | BLANK, min_size=1, max_size=8)
ANY_LINES = st.lists(GOOD.map(json.dumps) | BLANK | ODD | HUGE | st.text(max_size=20), max_size=6)


def damaged(raw, place, patch, keep):
    """Write `patch` over the bytes at a place, both as shares of the whole, and cut the end off."""
    start = int(place * len(raw))
    return (raw[:start] + patch + raw[start + len(patch) :])[: int(keep * len(raw)) + 1]


SHARE = st.floats(0, 1)
DAMAGE = st.one_of(
    st.just(lambda raw: raw),
    st.builds(lambda *how: lambda raw: damaged(raw, *how), SHARE, st.binary(max_size=4), SHARE),
)

# What text files bring with them: marks, bytes that end strings in C, and what other programs take for UTF-8.
DISGUISES = st.sampled_from(
    [
        lambda raw: raw,
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.replace(b"one", b"o\0e"),
        lambda raw: raw.replace(b"one", b"\xed\xa0\x80"),
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw.decode("utf-8", "replace").encode("utf-16"),
    ]
)
CHAT = GOOD.map(
    lambda r: {
        "user_id": r["user_id"],
        "prompt": [{"role": "user", "content": r["prompt"]}],
        "chosen": [{"role": "assistant", "content": r["chosen"]}],
        "rejected": [{"role": "assistant", "content": r["rejected"]}],
    }
)
SURROGATE = st.just('{"user_id": "ann", "prompt": "\\ud800", "chosen": "one", "rejected": "two"}')
TWINS = st.just('{"user_id": "ann", "prompt": "a", "chosen": "one", "rejected": "two", "rejected": "one"}')
LINES = st.lists(GOOD.map(json.dumps) | CHAT.map(json.dumps) | BLANK | ODD | HUGE | SURROGATE | TWINS, max_size=7)


@st.composite
def csv_files(draw):
    header = draw(st.permutations(FIELDS[:5]) | st.lists(st.sampled_from([*FIELDS, ""]), max_size=6))
    rows = draw(st.lists(GOOD | st.lists(st.text(max_size=6), max_size=6), max_size=6))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([r.get(name, "x") for name in header] if isinstance(r, dict) else r for r in rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def parquet_files(draw):
    """Tables of good rows of which some columns are of another type, missing, or there twice."""
    rows = draw(st.lists(GOOD, min_size=1, max_size=5))
    count = len(rows)
    names = draw(st.just(FIELDS[:5]) | st.lists(st.sampled_from(FIELDS), min_size=1, max_size=7))
    odd = [
        pa.array([7] * count),
        pa.array([b"\xff"] * count),
        pa.array([None] * count, pa.string()),
        pa.array([2**62] * count, pa.timestamp("us")),
        pa.array([2**62] * count, pa.duration("s")),
        pa.array([["one"]] * count),
        pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int64())),
        pa.array([{"role": "assistant", "content": "one"}] * count),
        pa.array([[{"role": "assistant", "content": str(i)}] for i in range(count)]),
        pa.array([r["chosen"] for r in rows]).dictionary_encode(),
    ]
    spoilt = draw(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(odd), max_size=2))
    columns = [spoilt[name] if name in spoilt else pa.array([r.get(name, "x") for r in rows]) for name in names]
    file = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), file, compression=draw(st.sampled_from(["none", "zstd"])))
    return file.getvalue()


@st.composite
def files(draw):
    """Return the name and the bytes of a file."""
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "parquet"]))
    if kind == "parquet":
        return "votes.parquet", draw(DAMAGE)(draw(parquet_files()))
    if kind == "csv":
        raw = draw(csv_files())
    else:
        raw = "\n".join(draw(LINES)).encode()
        raw = b"[" + b",\n".join(raw.split(b"\n")) + b"]" if kind == "json" and draw(st.booleans()) else raw
    raw = draw(DISGUISES)(draw(DAMAGE)(raw))
    if draw(st.booleans()):
        return f"votes.{kind}.gz", draw(DAMAGE)(gzip.compress(raw))
    return f"votes.{kind}", raw
