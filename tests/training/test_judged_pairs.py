"""Stored rows as pairs of distinct texts."""

from __future__ import annotations

import json

import pytest
import torch

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.rewards import JudgedPairs
from prlhf_lightning.training.judged_pairs import judged_pairs
from prlhf_lightning.training.user_start import codes_from

ROWS = [
    {"user_id": "b", "prompt": "the cat", "chosen": "sat", "rejected": "ran fast"},
    {"user_id": "a", "prompt": "the cat", "chosen": "ran fast", "rejected": "sat"},
    {"user_id": "a", "prompt": "the dog", "chosen": "sat", "rejected": "ran fast"},
]


def data_of(tmp_path, model_path, rows, **settings):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceDataModule(FileSource(str(path)), tokenizer=model_path, validation_fraction=0.0, **settings)


def test_pairs_are_those_of_the_rows_one_by_one(tmp_path, model_path):
    rows = data_of(tmp_path, model_path, ROWS).training_rows()
    found, expected = judged_pairs(rows), JudgedPairs.of_rows(rows)
    assert found.user_ids == expected.user_ids
    assert found.threshold == -1
    for one, other in ((found.chosen, expected.chosen), (found.rejected, expected.rejected)):
        keys = [[pairs.texts.keys[text] for text in side] for pairs, side in ((found, one), (expected, other))]
        assert keys[0] == keys[1]
    assert len(found.texts) == len(expected.texts) == 4  # equal completions of one prompt are one text
    assert found.texts.prompt_keys.count(found.texts.prompt_keys[0]) == 2


def test_a_thumb_is_a_pair_of_its_text_and_the_threshold(tmp_path, model_path):
    rows = [
        {"user_id": "a", "prompt": "the cat", "completion": "sat", "label": True},
        {"user_id": "a", "prompt": "the cat", "completion": "ran", "label": False},
    ]
    found = judged_pairs(data_of(tmp_path, model_path, rows, feedback="thumbs").training_rows(), [7])
    threshold = found.threshold
    sides = [*zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)]
    assert sorted((chosen == threshold, rejected == threshold) for chosen, rejected in sides) == [(0, 1), (1, 0)]
    assert found.texts.completions[threshold].tolist() == [7]


def test_a_selection_has_the_same_texts_under_other_numbers(tmp_path, model_path):
    found = judged_pairs(data_of(tmp_path, model_path, ROWS).training_rows())
    last = found.select(torch.tensor([2]))
    assert last.user_ids == ("a",)
    assert len(last.texts) == 2
    assert last.texts.keys[last.chosen[0]] == found.texts.keys[found.chosen[2]]
    assert last.texts.keys[last.rejected[0]] == found.texts.keys[found.rejected[2]]


@pytest.mark.parametrize("settings", [{"streaming": True}, {"feedback": "demonstrations"}])
def test_streams_and_demonstrations_give_no_codes(tmp_path, model_path, settings):
    data = data_of(tmp_path, model_path, ROWS, **settings)
    assert codes_from(data, data.vocabulary, 2) is None
