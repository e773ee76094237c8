import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from feedback_helpers import CHATML, row, word_tokenizer, write_jsonl

import prlhf_lightning
from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.data.store import FeedbackCache
from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.errors import FeedbackFormatError


class ListSource(DataSource):
    """Rows from memory; counts how often it is read."""

    def __init__(self, rows, mark="a"):
        self._rows, self.mark, self.reads = rows, mark, 0

    def splits(self):
        return {"train"}

    def rows(self, split):
        self.reads += 1
        for number, r in enumerate(self._rows, start=1):
            yield f"list:{number}", r

    def fingerprint(self, split):
        return self.mark


@pytest.fixture
def cache(tmp_path):
    return FeedbackCache(tmp_path / "cache", word_tokenizer(), TokenizationSettings(), "pairs", "error")


def test_rows_come_back_tokenised_with_user_place_and_position(cache):
    split = cache.open(ListSource([row(0, "ann"), row(1, "bob", user_text="six")]), "train")
    first, second = split.rows([1, 0])
    ids = cache.tokenizer.convert_tokens_to_ids
    assert (first["user_id"], first["where"], first["record"]) == ("bob", "list:2", 1)
    assert first["prompt_ids"] == ids(["<bos>", "w1", "w0"])
    assert first["chosen_ids"] == ids(["one", "two", "<eos>"])
    assert first["rejected_ids"] == ids(["three", "four", "<eos>"])
    assert (first["user_text_ids"], second["user_text_ids"]) == (ids(["six"]), [])


def test_many_batches_keep_their_order_and_users(cache):
    rows = [row(i % 1600, user=f"u{i % 7}") for i in range(2500)]
    split = cache.open(ListSource(rows), "train")
    assert len(split) == 2500
    assert [split.user_ids[user] for user in split.users] == [r["user_id"] for r in rows]
    assert [r["where"] for r in split.rows([0, 999, 1000, 2499])] == ["list:1", "list:1000", "list:1001", "list:2500"]


def test_a_second_start_reads_no_row(cache):
    source = ListSource([row(0)])
    cache.open(source, "train")
    assert len(replace(cache).open(source, "train")) == 1
    assert source.reads == 1


@pytest.mark.parametrize(
    "change",
    [
        {"settings": TokenizationSettings(max_prompt_length=7)},
        {"settings": TokenizationSettings(chat_template_date="2026-01-31")},
        {"tokenizer": word_tokenizer(bos=False)},
        {"tokenizer": word_tokenizer(template=CHATML)},
        {"feedback": "demonstrations"},
        {"ties": "drop"},
    ],
)
def test_other_settings_or_another_tokenizer_build_anew(cache, change):
    source = ListSource([row(0)])
    cache.open(source, "train")
    replace(cache, **change).open(source, "train")
    assert source.reads == 2


def test_changed_rows_or_columns_build_anew(cache):
    cache.open(ListSource([row(0)]), "train")
    assert len(cache.open(ListSource([row(0), row(1)], mark="b"), "train")) == 2
    renamed = ListSource([{**row(0), "worker": "eve"}])
    renamed.columns = {"user_id": "worker"}
    assert cache.open(renamed, "train").user_ids == ["eve"]


def test_a_bad_row_leaves_nothing_behind(cache):
    source = ListSource([*[row(i) for i in range(1500)], row(0, chosen="")])
    with pytest.raises(FeedbackFormatError, match="list:1501: field 'chosen' is empty"):
        cache.open(source, "train")
    assert [path.suffix for path in cache.root.iterdir()] in ([".lock"], [])


def test_a_build_that_was_killed_is_never_reused(cache, tmp_path):
    path = write_jsonl(tmp_path / "votes.jsonl", [row(i) for i in range(2500)])
    script = f"""
import os, signal
from feedback_helpers import word_tokenizer
from prlhf_lightning.data.store import FeedbackCache
from prlhf_lightning.data.sources.files import FileSource
from prlhf_lightning.data.tokenization import TokenizationSettings
from pathlib import Path

class Killed(FileSource):
    def rows(self, split):
        for number, item in enumerate(super().rows(split)):
            if number == 2200:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

Killed.__module__, Killed.__qualname__ = FileSource.__module__, FileSource.__qualname__  # so that the key is the same
FeedbackCache(Path({str(cache.root)!r}), word_tokenizer(), TokenizationSettings(), "pairs", "error").open(
    Killed({str(path)!r}), "train"
)
"""
    package = Path(prlhf_lightning.__file__).parent.parent
    paths = os.pathsep.join([str(package), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = cache.root.glob("*.building")
    assert (left / "rows.arrow").stat().st_size > 0
    assert len(cache.open(FileSource(path), "train")) == 2500
    assert not list(cache.root.glob("*.building"))
    assert left.with_suffix("").is_dir()  # the same key, so that the test tests what it says


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_without_a_cache_folder_rows_are_held_in_memory(cache, tmp_path, caplog, folder):
    (tmp_path / "file").write_text("in the way")
    kept = cache.open(ListSource([row(0), row(1)]), "train")
    held = replace(cache, root=tmp_path / folder).open(ListSource([row(0), row(1)]), "train")
    assert re.search(r"cache_dir is .*file.*cannot be written.* set data.cache_dir", caplog.text)
    assert held.rows([1, 0]) == kept.rows([1, 0])
    assert (held.report, held.user_ids, held.lengths.tolist()) == (kept.report, kept.user_ids, kept.lengths.tolist())


_NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(cache, monkeypatch, caplog, failing):
    with monkeypatch.context() as patch:
        patch.setattr(failing, Mock(side_effect=_NO_SPACE))
        assert len(cache.open(ListSource([row(0)]), "train")) == 1
    assert re.search(r"cache_dir is .*No space left", caplog.text)
    assert [path.suffix for path in cache.root.iterdir()] in ([".lock"], [])
    assert len(cache.open(ListSource([row(0)]), "train")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_while_rows_are_written_is_named(cache, monkeypatch, caplog):
    made = Path.mkdir

    def mkdir(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.suffix == ".building":
            (self / "rows.arrow").symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert len(cache.open(ListSource([row(i) for i in range(3000)]), "train")) == 3000
    assert re.search(r"cache_dir is .*No space left", caplog.text)
    assert [path.suffix for path in cache.root.iterdir()] in ([".lock"], [])


def test_a_cache_is_its_owners_alone(cache):
    cache.open(ListSource([row(0)]), "train")
    assert {path.stat().st_mode & 0o077 for path in cache.root.iterdir() if path.is_dir()} == {0}


def _cut_to(share):
    return lambda content: content[: int(share * len(content))]


def _flip_a_bit_at(share):
    def flip(content):
        place = int(share * len(content))
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return flip


@pytest.mark.parametrize("name", ["rows.arrow", "report.json", "sha256.json"])
@pytest.mark.parametrize("damage", [_cut_to(0), _cut_to(0.5), _flip_a_bit_at(0.3), _flip_a_bit_at(0.9)])
def test_a_damaged_cache_is_built_again(cache, caplog, name, damage):
    source = ListSource([row(i) for i in range(1500)])
    before = cache.open(source, "train").rows(range(1500))
    (path,) = cache.root.glob(f"*/{name}")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.open(source, "train").rows(range(1500)) == before
    assert "is damaged. It is built again" in caplog.text
    cache.open(source, "train")
    assert source.reads == 2


def test_a_source_that_fails_is_not_taken_for_a_full_disk(cache):
    source = ListSource([])
    source.rows = Mock(side_effect=ConnectionError("gone"))
    with pytest.raises(FeedbackFormatError, match="The train split of ListSource cannot be read"):
        cache.open(source, "train")


def test_truncations_are_reported_once_with_count_and_place(cache, caplog):
    cache = replace(cache, settings=TokenizationSettings(max_prompt_length=2))
    source = ListSource([row(0, prompt="one"), row(1), row(2)])
    with caplog.at_level(logging.WARNING):
        assert cache.open(source, "train").report.excess["prompt"].count == 2
        assert cache.open(source, "train").report.excess["prompt"].count == 2
    assert caplog.messages == [
        "2 of 3 train rows have a longer 'prompt' than allowed and were cut to the limit "
        "(first: list:2: field 'prompt' has 3 tokens, limit 2)."
    ]


def test_ties_are_an_error_unless_they_may_be_dropped(cache, caplog):
    source = ListSource([row(0), row(1, rejected="one two")])
    with pytest.raises(FeedbackFormatError, match=r"list:2: field 'chosen' equals 'rejected'.* set ties: drop"):
        cache.open(source, "train")
    split = replace(cache, ties="drop").open(source, "train")
    assert (len(split), split.report.ties) == (1, 1)
    assert "1 of 2 train rows have equal completions (or no winner) and were left out." in caplog.messages


def test_completions_that_truncation_made_equal_are_ties(cache, caplog):
    cache = replace(cache, settings=TokenizationSettings(max_completion_length=2))
    source = ListSource([row(0), row(1, chosen="one two three", rejected="one two four")])
    message = r"list:2: .* equal once truncated to 2 tokens.* raise max_completion_length \(now 2\), or set ties: drop"
    with pytest.raises(FeedbackFormatError, match=message):
        cache.open(source, "train")
    split = replace(cache, ties="drop").open(source, "train")
    assert (len(split), split.report.read, split.report.token_ties) == (1, 2, 1)
    assert "1 of 2 train rows have completions that are equal once tokenized and cut" in caplog.text


def test_completions_with_the_same_tokens_are_ties(cache):
    source = ListSource([row(0, chosen="strange", rejected="unheard")])
    with pytest.raises(FeedbackFormatError, match=r"list:1: .* have the same tokens in this tokenizer"):
        cache.open(source, "train")


def test_supervised_rows_are_no_ties(cache):
    rows = [{"user_id": "a", "prompt": "one", "chosen": "two"}]
    assert len(replace(cache, feedback="demonstrations").open(ListSource(rows), "train")) == 1


def test_a_split_all_of_whose_rows_were_dropped_is_refused(cache):
    cache = replace(cache, settings=TokenizationSettings(max_completion_length=1, overlong="drop"))
    with pytest.raises(FeedbackFormatError, match="The train split has no usable rows: 1 were read"):
        cache.open(ListSource([row(0)]), "train")


def test_prompts_share_a_key_and_so_do_pairs_whoever_won(cache):
    rows = [
        row(0),
        row(0, user="bob", chosen="three four", rejected="one two"),
        row(0, chosen="five"),
        row(1),
    ]
    split = cache.open(ListSource(rows), "train")
    a, b, c, d = split.keys("prompt")
    assert a == b == c != d
    a, b, c, d = split.keys("pair")
    assert a == b
    assert len({a, c, d}) == 3


def test_a_cache_that_bears_the_name_of_another_is_built_again(cache, caplog):
    cache.open(ListSource([row(0)]), "train")
    (other,) = (path for path in cache.root.iterdir() if path.is_dir())
    source = ListSource([row(1)], mark="b")
    before = cache.open(source, "train").rows([0])
    (own,) = (path for path in cache.root.iterdir() if path.is_dir() and path != other)
    shutil.rmtree(own)
    shutil.copytree(other, own)
    assert cache.open(source, "train").rows([0]) == before
    assert f"The cache {own} is damaged. It is built again." in caplog.text
