"""Whatever a file is, `data check` and `data convert` account for every row that could be read, and training agrees."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from malformed import files

from prlhf_lightning.cli.data_convert import convert_source
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.errors import PRLHFError


def parsed(source):
    """Return the records of a source, or None where a row or the file is refused in words."""
    try:
        return [parse_record(row, where) for where, row in source.rows("train")]
    except PRLHFError:
        return None


def converted(source, folder):
    """Return what became of the rows, the records written and the lines about the others."""
    try:
        counts = convert_source(source, folder, on_error="report")["train"]
    except PRLHFError:
        return None
    beside = folder / "train.rejected.jsonl"
    lines = beside.read_text().splitlines() if beside.exists() else []
    return counts, parsed(FileSource(folder / "train.parquet")), [json.loads(line) for line in lines]


@settings(max_examples=400, deadline=None)
@given(files())
def test_every_row_of_any_file_is_accepted_or_reported(file):
    name, raw = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        source = FileSource(path)
        report = Inspector(source)()
        found = report.splits["train"]
        assert found.rows == found.accepted + found.ties + found.rejected
        assert report.problems.count("error") == found.ties + found.rejected + len(found.unread)
        records = parsed(source)
        assert (records is not None) == report.ok
        assert records is None or len(records) == found.accepted
        conversion = converted(source, Path(folder) / "out")
        assert (conversion is None) == (found.accepted == 0)
        if conversion is not None:
            counts, written, lines = conversion
            assert counts.written + counts.rejected == found.rows
            assert len(lines) == counts.rejected + len(counts.unread)
            assert counts.unread == found.unread
            assert len(written) == counts.written <= found.accepted
            assert records is None or len(written) < len(records) or written == records
