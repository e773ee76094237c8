"""A source's counts are told in the description, and its prompts are answered for every user."""

import pytest
from feedback_helpers import byte_tokenizer, row, write_jsonl
from original_files import write_koala, write_psoups

from prlhf_lightning.data import FileSource, PersonalizedSoupsSource, PreferenceDataModule, RatingSource
from prlhf_lightning.errors import FeedbackFormatError


@pytest.fixture
def soups(tmp_path):
    source = PersonalizedSoupsSource(write_psoups(tmp_path / "soups"), write_koala(tmp_path / "koala.json"))

    def make(**settings):
        return PreferenceDataModule(source, byte_tokenizer(), cache_dir=tmp_path / "cache", **settings)

    return make


def test_what_a_protocol_leaves_out_is_described(soups):
    for data in (soups(), soups()):  # the second from the cache
        told = data.describe()
        assert "train: 6 left out (equal completions); train: 24 left out (repeated comparisons)" in told


def test_a_protocol_that_leaves_nothing_says_why(tmp_path):
    rating = {"user_id": "ann", "prompt": "p", "rating": 1}
    path = write_jsonl(tmp_path / "a.jsonl", [rating | {"completion": text} for text in "ab"])
    data = PreferenceDataModule(RatingSource(FileSource(path)), byte_tokenizer(), cache_dir=tmp_path / "cache")
    with pytest.raises(FeedbackFormatError, match=r"no usable rows.* Before that: 1 left out \(equal scores\)"):
        data.prepare_data()


def test_unjudged_prompts_are_answered_for_every_seen_user(soups):
    data = soups(eval_batch_size=6)
    assert data.eval_sets["predict"] == ("prompts",)
    assert data.eval_sets["validate"] == ("seen",)
    (loader,) = data.predict_dataloader()
    batches = list(loader)
    assert [batch.user_ids for batch in batches] == [tuple("123456")] * 3
    assert all(batch.prompt.mask.any() and not batch.chosen.mask.any() for batch in batches)
    places = [data.where(6 * i, "predict").rpartition("/")[2] for i in range(3)]
    assert places == ["koala.json:1, row 1", "koala.json:1, row 2", "koala.json:1, row 3"]


def test_a_source_without_prompts_is_predicted_on_its_own_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    data = PreferenceDataModule(FileSource(path), byte_tokenizer(), validation_fraction=0.3, cache_dir=tmp_path / "c")
    assert data.eval_sets["predict"] == ("seen",)
    assert data.source.counts("train") == {}
