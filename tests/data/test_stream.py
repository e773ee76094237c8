import logging
from collections import Counter
from itertools import groupby

import pytest
from feedback_helpers import row, word_tokenizer, write_jsonl

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.data.streaming import StreamBatchSampler, StreamOrder
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

ROWS = [row(i, user=f"u{i % 7}", chosen=" ".join(["one"] * (1 + i % 9))) for i in range(103)]


@pytest.fixture
def make(tmp_path):
    def make(rows=ROWS, source=None, **settings):
        source = source or FileSource(write_jsonl(tmp_path / "votes.jsonl", rows))
        options = {"streaming": True, "batch_size": 4, "shuffle_buffer": 40, "validation_fraction": 0.0, **settings}
        return PreferenceDataModule(source, word_tokenizer(), cache_dir=tmp_path / "cache", **options)

    return make


def contents(batches):
    """What every row of some batches holds."""
    return Counter(
        (batch.user_ids[i], *(tuple(part.ids[i][part.mask[i]].tolist()) for part in (batch.prompt, batch.chosen,
                                                                                    batch.rejected)))
        for batch in batches
        for i in range(len(batch))
    )  # fmt: skip


def batches_of(data, rank=0, world_size=1, epoch=0, start=0):
    """The batches that a rank is given, each as the numbers of its rows."""
    sampler = data._training_batches(rank, world_size)
    sampler.set_epoch(epoch, start)
    loader = data._loader(data._prepared.stream(data._prepared.division.train, sampler), sampler)
    return [batch.records.tolist() for batch in loader]


@pytest.mark.parametrize("settings", [{}, {"bucket_by_length": True}, {"pairs_per_user": 3, "num_workers": 2}])
def test_a_stream_shows_the_very_rows_that_stored_data_do(make, settings):
    streamed = contents(make(**settings).train_dataloader())
    assert streamed == contents(make(streaming=False).train_dataloader())
    assert streamed.total() == len(ROWS)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_the_rows_without_overlap(make, world_size, num_workers):
    data = make(num_workers=num_workers)
    shares = [batches_of(data, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {data.batches_per_epoch(world_size)}
    assert sorted(record for share in shares for batch in share for record in batch) == list(range(len(ROWS)))


def test_every_rank_has_a_row_where_the_last_step_is_short(make):
    shares = [batches_of(make(ROWS[:41]), rank, 4) for rank in range(4)]  # two steps of 16, one of 9 rows
    assert [len(share) for share in shares] == [3] * 4
    shares = [batches_of(make(ROWS[:33]), rank, 4) for rank in range(4)]  # ... and one row, which all get
    assert [share[-1] for share in shares] == [[32]] * 4


def test_more_processes_make_the_same_steps(make):
    alone = batches_of(make(batch_size=8))
    together = zip(*(batches_of(make(batch_size=4), rank, 2) for rank in (0, 1)), strict=True)
    assert alone == [a + b for a, b in together]


def test_epochs_differ_and_come_again(make):
    data = make()
    first, second = batches_of(data), batches_of(data, epoch=1)
    assert first != second
    assert first == batches_of(make()) != batches_of(make(seed=1))
    assert second == batches_of(make(num_workers=2), epoch=1)


@pytest.mark.parametrize("start", [1, 10, 25])
def test_an_epoch_goes_on_at_any_batch(make, start):
    assert batches_of(make(), start=start) == batches_of(make())[start:]


def test_rows_that_were_read_already_are_not_tokenised_again(make, monkeypatch):
    seen = []
    data = make()
    sampler = data._training_batches(0, 1)
    sampler.set_epoch(0, 20)  # of 26
    stream = data._prepared.stream(data._prepared.division.train, sampler)
    tokenize = stream._tokenize
    monkeypatch.setattr(stream, "_tokenize", type("Spy", (), {"excess": {}, "settings": tokenize.settings, "__call__":
                        lambda _, records, wheres: seen.extend(wheres) or tokenize(records, wheres)})())  # fmt: skip
    assert sum(map(len, data._loader(stream, sampler))) == len(seen) == 103 - 80


def test_rows_of_one_user_stand_side_by_side(make):
    data = make(pairs_per_user=4, batch_size=20, shuffle_buffer=100)
    runs = [len(list(run)) for batch in batches_of(data)[:5] for _, run in groupby(batch, lambda record: record % 7)]
    assert len(runs) <= 5 * (7 + 4)  # 15 rows of each of seven users in runs of four, some cut at the edge of a batch


def test_a_row_moves_no_further_than_its_block(make):
    rows = [record for batch in batches_of(make(shuffle_buffer=40)) for record in batch]
    assert [sorted(rows[i : i + 40]) for i in (0, 40)] == [list(range(40)), list(range(40, 80))]


def test_rows_of_about_the_same_length_share_a_batch(make):
    def spread(**settings):
        return sum(max(b % 9 for b in batch) - min(b % 9 for b in batch) for batch in batches_of(make(**settings)))

    assert spread(bucket_by_length=True) < 0.5 * spread()


def test_held_out_users_are_passed_over(make):
    data = make(unseen_user_fraction=0.4, seed=1)
    shown = {user for batch in data.train_dataloader() for user in batch.user_ids}
    assert shown == set(data.vocabulary.ids) < {f"u{i}" for i in range(7)}
    assert "train rows of" in data.describe()


def test_a_bad_row_is_named_when_it_is_reached(make):
    with pytest.raises(FeedbackFormatError, match=r"votes.jsonl:3: field 'rejected' is null"):
        list(make([*ROWS[:2], row(2, rejected=None)]).train_dataloader())


def test_rows_that_cannot_be_reached_are_no_stack_trace(make, monkeypatch):
    data = make()
    data.prepare_data()
    monkeypatch.setattr(FileSource, "rows", lambda *_: (_ for _ in ()).throw(OSError("the network is down")))
    with pytest.raises(FeedbackFormatError, match=r"train split of FileSource cannot be read .*the network is down"):
        next(iter(data.train_dataloader()))


def test_ties_stop_training_or_are_left_out_with_a_warning(make, caplog):
    rows = [*ROWS[:8], row(8, chosen="one", rejected="one"), row(9, chosen="nonsense", rejected="words")]
    with pytest.raises(FeedbackFormatError, match=r"equals 'rejected'|have the same tokens"):
        list(make(rows).train_dataloader())
    with caplog.at_level(logging.WARNING):
        assert len(contents(make(rows, ties="drop").train_dataloader())) == 8
    assert "equal completions" in caplog.text
    assert "equal once tokenized" in caplog.text


def test_a_batch_all_of_whose_rows_are_left_out_gets_another(make):
    rows = [row(i, chosen="one", rejected="one") if i < 4 else row(i) for i in range(8)]
    data = make(rows, batch_size=1, ties="drop")
    batches = batches_of(data)
    assert [len(batch) for batch in batches] == [1] * 8
    assert {record for (record,) in batches} == {4, 5, 6, 7}
    with pytest.raises(FeedbackFormatError, match=r"votes.jsonl:1 to .*votes.jsonl:4: none of these rows"):
        batches_of(make(rows[:4], batch_size=1, ties="drop"))


def test_a_batch_that_is_left_out_comes_after_one_that_was_cut(make):
    rows = [row(0, chosen="one two three four"), row(1, chosen="one", rejected="one")]
    assert len(batches_of(make(rows, batch_size=1, ties="drop", max_completion_length=3))) == 2


def test_rows_over_a_limit_are_cut_and_reported(make, caplog):
    batch = next(iter(make(max_completion_length=3).train_dataloader()))
    assert batch.chosen.ids.shape[1] == 3
    assert "have a longer 'chosen' than allowed and are cut to the limit" in caplog.text


@pytest.mark.parametrize(
    ("users", "says"),
    [
        ("user_id,rows\nu0,5\n", "votes.jsonl:2: field 'user_id' names a user who was not there"),
        ("user_id,rows\nu0,5\nu1,2\n", "the train split has more than the 7 rows"),
        ("user_id,rows\nu0,5\nu1,6\n", "ended after 10 of the 11 rows"),
    ],
)
def test_a_wrong_count_is_noticed(make, tmp_path, users, says):
    (tmp_path / "users.csv").write_text(users)
    data = make([row(i, f"u{i % 2}") for i in range(10)], users_file=tmp_path / "users.csv")
    with pytest.raises(FeedbackFormatError, match=says):
        list(data.train_dataloader())


def test_users_are_known_by_their_pseudonyms(make, tmp_path, monkeypatch):
    monkeypatch.setenv("SALT", "a secret of many bytes")
    (tmp_path / "users.csv").write_text("user_id,rows\n" + "".join(f"u{i},{15 if i < 5 else 14}\n" for i in range(7)))
    stored = make(streaming=False, hash_user_ids_with="SALT").vocabulary
    for settings in ({}, {"users_file": tmp_path / "users.csv"}):
        data = make(hash_user_ids_with="SALT", **settings)
        assert data.vocabulary == stored
        assert {user for batch in data.train_dataloader() for user in batch.user_ids} == set(stored.ids)
    assert not any(b"u1," in path.read_bytes() for path in (tmp_path / "cache").glob("users-*.csv"))


def test_a_row_is_found_by_its_number(make):
    assert make().where(41).endswith("votes.jsonl:42")


def test_nothing_to_validate_on_is_told(make):
    assert "no rows to validate on" in make(validation_fraction=0.1).describe()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"balance": 0.5}, "set balance: 0"),
        ({"max_tokens_per_batch": 64}, "set it to null"),
        ({"shuffle_buffer": 0}, "at least 1 row"),
        ({"streaming": False, "users_file": "users.csv"}, "set streaming: true"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(make, settings, says):
    with pytest.raises(ConfigurationError, match=says):
        make(**settings)


def test_the_sizes_of_steps_add_up_to_the_epoch():
    sampler = StreamBatchSampler(StreamOrder(103, 4, 1, False, 0, 40, rank=0, world_size=2))
    assert sampler.pairs_per_rank(0, slice(None)) == 103 / 2
    assert sampler.pairs_per_rank(0, slice(12, 13)) == 7 / 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_row_keeps_its_fields_in_any_process(make, num_workers):
    data = make([*ROWS, {**row(0), "rejected": " "}], shuffle_buffer=len(ROWS) + 1, num_workers=num_workers)
    with pytest.raises(FeedbackFormatError) as caught:
        list(data.train_dataloader())
    error = caught.value
    assert (error.where.line, error.field, error.problem) == (len(ROWS) + 1, "rejected", "is empty")
    assert str(error).startswith(f"{error.where.file}:{len(ROWS) + 1}: field 'rejected' is empty; ")
