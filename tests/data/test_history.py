"""Histories of training pairs."""

from __future__ import annotations

import pytest
from conftest import write_votes

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError


@pytest.fixture
def data(tmp_path, model_path):
    votes = write_votes(tmp_path / "votes.jsonl", {"ann": 12, "bob": 6, "once": 1})
    return PreferenceDataModule(
        FileSource(votes), model_path, batch_size=5, history_size=4, validation_fraction=0.2, split_by="pair"
    )


def rows(data, indices):
    return data.train_dataloader().dataset.__getitems__(indices)


def test_a_history_is_of_other_training_pairs_of_the_same_user(data):
    training = set(data.train_dataloader().dataset.pairs.positions.tolist())
    found = [row for _ in range(4) for indices in ([0, 5, 9], [7, 3]) for row in rows(data, indices)]
    for row in found:
        records = [other["record"] for other in row["history"]]
        assert all(other["user_id"] == row["user_id"] for other in row["history"])
        assert len(set(records)) == len(records) <= 4
        assert set(records) <= training - {row["record"]}


def test_every_size_is_drawn_and_every_other_pair(data):
    size = len(data.train_dataloader().dataset)
    drawn = [(row["record"], row["user_id"], row["history"]) for k in range(60) for row in rows(data, [0, k % size])]
    first = [history for record, _, history in drawn if record == drawn[0][0]]
    assert {len(history) for history in first} == {0, 1, 2, 3, 4}
    own = {record for record, user_id, _ in drawn if user_id == drawn[0][1]}
    assert {row["record"] for history in first for row in history} == own - {drawn[0][0]}


def test_draws_depend_on_the_batch_and_are_the_same_again(data):
    def records(indices):
        return [[other["record"] for other in row["history"]] for row in rows(data, indices)]

    assert records([0, 1, 2]) == records([0, 1, 2])
    assert any(records([0, 1, 2])[0] != records([0, other, 2])[0] for other in (3, 4, 5))


def test_a_batch_carries_padded_histories_and_evaluation_none(data):
    batch = next(iter(data.train_dataloader()))
    assert batch.history.chosen.ids.shape[:2] == batch.history.rejected.ids.shape[:2]
    assert batch.history.chosen.ids.shape[0] == len(batch)
    assert (batch.history.chosen.mask.any(-1) == batch.history.rejected.mask.any(-1)).all()
    assert next(iter(data.val_dataloader()[0])).history is None


def test_users_are_shown_with_the_same_pairs_each_time(data):
    ((ids, pairs),) = data.histories()
    ((_, again),) = data.histories()
    counts = dict(zip(ids, pairs.chosen.mask.any(-1).sum(1).tolist(), strict=True))
    assert set(counts) == set(data.vocabulary.ids)
    assert counts["ann"] == 4
    assert pairs.chosen.ids.equal(again.chosen.ids)


@pytest.mark.parametrize("settings", [{"streaming": True}, {"feedback": "thumbs"}])
def test_histories_of_streams_and_of_thumbs_are_refused(settings):
    with pytest.raises(ConfigurationError, match="history_size is 4; histories need stored pairs"):
        PreferenceDataModule(FileSource("votes.jsonl"), history_size=4, **settings)
