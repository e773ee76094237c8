"""What users judged, as a model of users alone needs it."""

from __future__ import annotations

import json

import pytest

from prlhf_lightning.data import FileSource, PreferenceDataModule


def judged(tmp_path, model_path, rows, **settings):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataModule(FileSource(str(path)), tokenizer=model_path, validation_fraction=0.0, **settings)
    return data, data.judged_texts(data.vocabulary)


ROWS = [
    {"user_id": "b", "prompt": "the cat", "chosen": "sat", "rejected": "ran fast"},
    {"user_id": "a", "prompt": "the cat", "chosen": "ran fast", "rejected": "sat"},
    {"user_id": "a", "prompt": "the dog", "chosen": "sat", "rejected": "ran fast"},
]


def test_each_side_of_each_pair_is_a_judgment_of_its_user(tmp_path, model_path):
    data, found = judged(tmp_path, model_path, ROWS)
    starts = (found.lengths.cumsum(0) - found.lengths).tolist()
    contents = [
        tuple(found.ids[start : start + size].tolist())
        for start, size in zip(starts, found.lengths.tolist(), strict=True)
    ]
    expected = []
    for row in ROWS:
        for value, side in ((1.0, "chosen"), (-1.0, "rejected")):
            ids = data._prepared.tokenize.tokenizer(row[side], add_special_tokens=False)["input_ids"]
            expected.append((row["user_id"], value, ids))
    ids = ["", *data.vocabulary.ids]
    actual = sorted(
        (ids[row], value, [token for token in contents[text] if token > 3])
        for row, text, value in zip(found.rows.tolist(), found.texts.tolist(), found.values.tolist(), strict=True)
    )
    assert actual == sorted(expected)


def test_equal_completions_of_one_prompt_are_one_text(tmp_path, model_path):
    _, found = judged(tmp_path, model_path, ROWS)
    assert len(found.lengths) == 4
    assert len(found.texts) == 6


def test_a_thumb_is_one_judgment(tmp_path, model_path):
    rows = [
        {"user_id": "a", "prompt": "the cat", "completion": "sat", "label": True},
        {"user_id": "a", "prompt": "the cat", "completion": "ran", "label": False},
    ]
    _, found = judged(tmp_path, model_path, rows, feedback="thumbs")
    assert sorted(found.values.tolist()) == [-1.0, 1.0]


@pytest.mark.parametrize("settings", [{"streaming": True}, {"feedback": "demonstrations"}])
def test_a_stream_and_demonstrations_have_none(tmp_path, model_path, settings):
    _, found = judged(tmp_path, model_path, ROWS, **settings)
    assert found is None
