"""Whatever the bytes of a file, it is loaded whole or refused in words; no row is lost without being counted."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

from feedback_helpers import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import ANY_LINES, DAMAGE, FIELDS, GOOD, GOOD_LINES, SHARE, TEXT, damaged

from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.data.store import FeedbackCache
from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.errors import PRLHFError

unhurried = settings(deadline=None)  # each example builds a cache on disk
TOKENIZER = word_tokenizer()
LIMITS = st.builds(
    TokenizationSettings,
    max_prompt_length=st.sampled_from([2, 8]),
    max_completion_length=st.sampled_from([2, 8]),
    max_user_text_length=st.sampled_from([2, 8]),
    overlong=st.sampled_from(["truncate", "drop"]),
)


def load(name, raw, limits=None):
    """Return the report on a file and the rows of its split, or None where it was refused in words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        cache = FeedbackCache(Path(folder) / "cache", TOKENIZER, limits or TokenizationSettings(), "pairs", "drop")
        try:
            split = cache.open(FileSource(path), "train")
        except PRLHFError:
            return None
        return split.report, split.rows(range(len(split)))


def conserved(loaded, count):
    report, rows = loaded
    return len(rows) + report.ties + report.token_ties + report.too_long == report.read == count


def filled(raw):
    return [line for line in raw.split(b"\n") if line.decode("utf-8-sig").strip()]


@unhurried
@given(ANY_LINES, DAMAGE, LIMITS)
def test_a_jsonl_file_of_any_bytes_is_loaded_whole_or_refused(lines, damage, limits):
    raw = damage("\n".join(lines).encode())
    loaded = load("votes.jsonl", raw, limits)
    assert loaded is None or conserved(loaded, len(filled(raw)))


@unhurried
@given(GOOD_LINES, LIMITS)
def test_a_good_jsonl_file_is_refused_only_where_no_row_is_left(lines, limits):
    loaded = load("votes.jsonl", "\n".join(lines).encode(), limits)
    good = [json.loads(line) for line in lines if line.strip()]
    # Rows of which no truncation makes a tie.
    apart = [r for r in good if {r["chosen"].split()[0], r["rejected"].split()[0]} == {"one", "two"}]
    assert loaded is not None or not apart or limits.overlong == "drop"
    assert loaded is None or conserved(loaded, len(good))


@unhurried
@given(ANY_LINES, DAMAGE)
def test_a_json_array_of_any_bytes_is_loaded_whole_or_refused(lines, damage):
    raw = damage(("[" + ",\n".join(lines) + "]").encode())
    loaded = load("votes.json", raw)
    if loaded is not None:  # commas are not insisted on, so count objects: none of a good row holds another
        assert conserved(loaded, raw.count(b'"user_id"'))


@unhurried
@given(st.lists(st.lists(st.text(max_size=9) | TEXT, max_size=6), max_size=5), st.lists(GOOD, max_size=5), DAMAGE)
def test_a_csv_file_of_any_bytes_is_loaded_whole_or_refused(odd, good, damage):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS[:5])
    writer.writerows([[r[name] for name in FIELDS[:5]] for r in good])
    writer.writerows(odd)
    raw = damage(text.getvalue().encode("utf-8", "surrogatepass"))
    loaded = load("votes.csv", raw)
    if loaded is not None:
        rows = [values for values in csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")) if values]
        assert conserved(loaded, len(rows) - 1)


@unhurried
@given(st.sampled_from(["votes.jsonl", "votes.json", "votes.csv", "votes.parquet", "votes.jsonl.gz"]), st.binary())
def test_random_bytes_are_refused(name, raw):
    assert load(name, raw) is None


@unhurried
@given(
    st.lists(GOOD, min_size=1, max_size=5),
    st.builds(lambda *how: lambda raw: damaged(raw, *how), SHARE, st.binary(max_size=4), SHARE),
)
def test_a_damaged_gzip_file_is_refused_or_its_content_is_whole(rows, damage):
    whole = "".join(json.dumps(r) + "\n" for r in rows).encode()
    loaded = load("votes.jsonl.gz", damage(gzip.compress(whole)))
    assert loaded is None or conserved(loaded, len(rows))
