"""Feedback as numbers."""

import json
import math

import pytest

from prlhf_lightning.analysis.feedback_table import SURFACE_FEATURES, count_words, read_table, surface_features
from prlhf_lightning.data import FileSource
from prlhf_lightning.errors import FeedbackFormatError


def written(path, rows):
    names = ("user_id", "prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_a_response_to_a_prompt_is_one_item_everywhere(tmp_path):
    train = written(tmp_path / "a.jsonl", [("u", "p", "x y", "z"), ("v", "p", "z", "x y"), ("v", "q", "z", "w")])
    validation = written(tmp_path / "b.jsonl", [("w", "p", "z", "new")])
    table = read_table(FileSource(train, validation), ["train", "validation"])
    assert table.chosen.tolist() == [0, 1, 2, 1]
    assert table.rejected.tolist() == [1, 0, 3, 4]
    assert table.users.tolist() == [0, 1, 1, 2]
    assert table.prompts.tolist() == [0, 0, 1, 1, 0]
    assert (table.words.tolist(), table.characters.tolist()) == ([2, 1, 1, 1, 1], [3, 1, 1, 1, 3])
    assert table.of("validation") == slice(3, 4)
    assert table.of("test") == slice(0, 0)


def test_ties_are_counted_and_left_out_and_other_faults_named(tmp_path):
    path = written(tmp_path / "a.jsonl", [("u", "p", "x", "x"), ("u", "p", "x", "y")])
    table = read_table(FileSource(path), ["train"])
    assert (table.rows, table.ties) == ({"train": 1}, {"train": 1})
    written(path, [("u", "p", "x", "y"), ("u", "p", "x", None)])
    with pytest.raises(FeedbackFormatError, match=r"a\.jsonl:2: field 'rejected'"):
        read_table(FileSource(path), ["train"])


def test_conversations_are_read_by_what_was_said(tmp_path):
    path = tmp_path / "a.jsonl"
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("one two", "three"))
    prompt = [{"role": "user", "content": "say one"}]
    path.write_text(json.dumps({"user_id": "u", "prompt": prompt, "chosen": chosen, "rejected": rejected}))
    table = read_table(FileSource(path), ["train"])
    assert (table.words.tolist(), table.prompt_words.tolist()) == ([2, 1], [2])
    assert table.features[:, -1].tolist() == [0.5, 0]


def test_surface_features_count_what_they_say():
    found = dict(
        zip(SURFACE_FEATURES, surface_features("Why is it so?", "Why? It is.\nThere are 12 of it!"), strict=True)
    )
    assert found["words (log)"] == pytest.approx(math.log1p(8))
    assert found["sentences (log)"] == pytest.approx(math.log1p(3))
    assert found["question marks (log)"] == found["exclamation marks (log)"] == pytest.approx(math.log1p(1))
    assert found["line breaks (log)"] == pytest.approx(math.log1p(1))
    assert found["digits (log)"] == pytest.approx(math.log1p(2))
    assert found["share of its words in the prompt"] == pytest.approx(3 / 7)
    assert surface_features("", "...")[1] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [("Hello, you_2 wörld", 3), ("我喜欢茶", 4), ("안녕 세상", 2), ("नमस्ते दुनिया", 2), ("مَرحبا بكم", 2), ("", 0)],
)
def test_words_are_counted_in_any_script(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("- a\n* b\n 1. c\n(2) d\na) e\n• f", "list items (log)", 6),
        ("I. am 5 - x\nNo. 5\n-5 degrees\n3.5 meters", "list items (log)", 0),
        ("\u8336\u3002\u597d\u304d\uff1f\u306f\u3044\uff01", "sentences (log)", 3),
        ("\u597d\u304d\uff1f \u0645\u0627 \u0647\u0630\u0627\u061f", "question marks (log)", 2),
        ("fine 😀🎉", "emoji (log)", 2),
    ],
)
def test_lists_and_marks_are_counted_in_any_script(text, name, count):
    found = dict(zip(SURFACE_FEATURES, surface_features("", text), strict=True))
    assert found[name] == pytest.approx(math.log1p(count))
