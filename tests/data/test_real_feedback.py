"""Real data, where it is at hand: in the folder that PRLHF_TEST_DATA names, or in ../shared/data."""

import os
from pathlib import Path

import pytest
from feedback_helpers import byte_tokenizer

from prlhf_lightning.data import FileSource, PreferenceDataModule

FOLDER = Path(os.environ.get("PRLHF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("name", "train", "users", "seen"), [("jester", 39_946, 999, 9_777), ("ukpconvarg", 49_802, 3_353, None)]
)
def test_real_feedback_loads_whole(tmp_path, name, train, users, seen):
    if not (FOLDER / name).exists():
        pytest.skip(f"no {name} data in {FOLDER}")
    source = FileSource(FOLDER / name / "train.jsonl.gz", validation=FOLDER / name / "validation.jsonl.gz")
    data = PreferenceDataModule(source, byte_tokenizer(), batch_size=1, ties="drop", cache_dir=tmp_path)
    assert data.batches_per_epoch() == train
    assert len(data.vocabulary.ids) == users
    if seen is not None:
        assert len(data.val_dataloader()[0].dataset) == seen
