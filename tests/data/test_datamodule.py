import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch
from feedback_helpers import CHATML, row, word_tokenizer, write_jsonl
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


class Recorder(LightningModule):
    """Learns nothing, and remembers which rows it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch_idx, batch.records.tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, batch.user_ids))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch.records

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 3, **quiet, **settings})


ROWS = [row(i, user=f"u{i % 10}") for i in range(100)]


@pytest.fixture
def votes(tmp_path):
    return write_jsonl(tmp_path / "votes.jsonl", ROWS)


@pytest.fixture
def make(votes, tmp_path):
    def make(source=None, tokenizer=None, **settings):
        source = source or FileSource(votes)
        return PreferenceDataModule(source, tokenizer or word_tokenizer(), cache_dir=tmp_path / "cache", **settings)

    return make


def epochs(model):
    return [[position for e, _, batch in model.trained if e == epoch for position in batch] for epoch in range(3)]


def test_a_mistyped_tokenizer_is_told_and_not_asked_for(make, tmp_path):
    for name, says in (("modle", "there is no such folder, and a name on the hub"), (str(tmp_path), "no tokenizer")):
        with pytest.raises(ConfigurationError, match=f"tokenizer: '{name}' could not be loaded; .*Cause: .*{says}"):
            make(tokenizer=name).prepare_data()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_shows_every_training_pair_in_a_new_order(make, num_workers):
    model = Recorder()
    trainer().fit(model, datamodule=make(validation_fraction=0.0, num_workers=num_workers))
    first, second, third = epochs(model)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(100))
    assert first != second != third != first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_training_resumes_with_the_very_next_batch(make, tmp_path, step, num_workers):
    settings = {"batch_size": 40, "validation_fraction": 0.0, "num_workers": num_workers}
    whole, rest = Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    trainer(callbacks=[saver], enable_checkpointing=True).fit(whole, datamodule=make(**settings))
    trainer().fit(rest, datamodule=make(**settings), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert rest.trained == whole.trained[step:]
    assert len(rest.trained) == 9 - step


@pytest.mark.parametrize("step", [3, 4, 7])
def test_training_under_a_budget_resumes_with_the_next_batch(make, tmp_path, step):
    rows = [row(i, user=f"u{i % 10}", chosen="one " * (1 + i % 23)) for i in range(100)]
    path = write_jsonl(tmp_path / "uneven.jsonl", rows)
    settings = {"batch_size": 40, "max_tokens_per_batch": 900, "validation_fraction": 0.0, "pairs_per_user": 2}
    whole, rest = Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    trainer(callbacks=[saver], enable_checkpointing=True).fit(whole, datamodule=make(FileSource(path), **settings))
    trainer().fit(rest, datamodule=make(FileSource(path), **settings), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert rest.trained == whole.trained[step:]
    assert len(whole.trained) == 3 * make(FileSource(path), **settings).batches_per_epoch()
    assert [sorted(epoch) for epoch in epochs(whole)] == [list(range(100))] * 3


def test_a_batch_is_padded_to_no_more_tokens_than_its_budget(make, tmp_path):
    rows = [row(i, chosen="one " * (1 + i % 23), user_text="six" if i % 3 else None) for i in range(100)]
    data = make(FileSource(write_jsonl(tmp_path / "a.jsonl", rows)), batch_size=40, max_tokens_per_batch=300)
    batches = list(data.train_dataloader())
    assert len(batches) == data.batches_per_epoch()
    for batch in batches:
        lengths = sum(part.mask.sum(-1) for part in (batch.user_text, batch.prompt, batch.chosen))
        assert 2 * len(batch) * lengths.max() <= 300
    assert max(len(batch) for batch in batches) > min(len(batch) for batch in batches)


def test_bucketing_puts_pairs_of_one_length_together(make, tmp_path):
    rows = [row(i, chosen="one " * (1 + i % 23)) for i in range(100)]
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", rows))
    spread = [
        sum(int(batch.chosen.mask.sum(-1).max() - batch.chosen.mask.sum(-1).min()) for batch in data.train_dataloader())
        for data in (make(source), make(source, bucket_by_length=True))
    ]
    assert spread[1] < spread[0] / 4


def test_rows_that_alone_exceed_the_budget_are_counted(make, tmp_path):
    rows = [*ROWS[:4], row(5, chosen="one " * 30)]
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", rows))
    data = make(source, validation_fraction=0.0, max_tokens_per_batch=60)
    assert "1 of them alone exceed max_tokens_per_batch=60" in data.describe()


def test_overfitting_repeats_the_same_batches(make):
    model = Recorder()
    trainer(overfit_batches=2).fit(model, datamodule=make())
    first, second, _ = epochs(model)
    assert first == second
    assert len(first) == 16


def test_nothing_is_warned_about_that_a_user_must_ignore(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, data = Recorder(), make()
        trainer().fit(model, datamodule=data)
        trainer().predict(model, datamodule=data)
        trainer().fit(model, datamodule=make(validation_fraction=0.0))
    about_data = ("dataloader", "sampler", "Total length")
    assert not [w for w in caught if any(word in str(w.message) for word in about_data)]


def test_validation_is_divided_into_seen_and_unseen_users(make):
    data = make(validation_fraction=0.2, unseen_user_fraction=0.3)
    model = Recorder()
    trainer(max_epochs=1).fit(model, datamodule=data)
    assert data.eval_sets["validate"] == data.eval_sets["predict"] == ("seen", "unseen")
    for index, users in model.validated:
        assert all((user in data.vocabulary) == (index == 0) for user in users)
    assert {index for index, _ in model.validated} == {0, 1}
    assert data.num_users == len(data.vocabulary) == 11 - len({u for i, us in model.validated for u in us if i})


@pytest.mark.parametrize("settings", [{}, {"streaming": True, "validation_fraction": 0.0}])
def test_votes_are_counted_of_those_who_are_trained_on(make, settings):
    data = make(**{"validation_fraction": 0.2, "unseen_user_fraction": 0.3, **settings})
    trained = Counter(user for batch in data.train_dataloader() for user in batch.user_ids)
    assert data.votes_by_user() == trained
    assert set(trained) == set(data.vocabulary.ids)


def test_a_validation_split_of_the_source_is_used_as_it_is(make, votes, tmp_path):
    held_out = [row(7, user="u1"), row(8, user="stranger"), row(9, user="u2")]
    data = make(FileSource(votes, validation=write_jsonl(tmp_path / "held.jsonl", held_out)))
    seen, unseen = data.val_dataloader()
    assert [batch.user_ids for batch in seen] == [("u1", "u2")]
    assert [batch.user_ids for batch in unseen] == [("stranger",)]
    assert data.batches_per_epoch() == 13  # all 100 rows are trained on, 8 at a time


def test_held_out_users_are_unseen_in_the_sources_validation(make, votes, tmp_path):
    held_out = [row(7, user=f"u{i}") for i in range(10)]
    source = FileSource(votes, validation=write_jsonl(tmp_path / "held.jsonl", held_out))
    data = make(source, unseen_user_fraction=0.3)
    _, unseen = data.val_dataloader()
    users = {user for batch in unseen for user in batch.user_ids}
    assert users
    assert not users & set(data.vocabulary.ids)
    assert f"train rows of {len(users)} held-out users are not used" in data.describe()


def test_prediction_takes_every_row_of_the_test_split_once(make, votes, tmp_path):
    source = FileSource(votes, test=write_jsonl(tmp_path / "test.jsonl", [row(i, user="u1") for i in range(20)]))
    data = make(source, eval_batch_size=6)
    batches = trainer().predict(Recorder(), datamodule=data)
    assert data.eval_sets["predict"] == ("seen",)
    assert torch.cat(batches).tolist() == list(range(20))


def test_a_test_without_a_test_split_is_refused(make):
    with pytest.raises(ConfigurationError, match="There are no rows to test on; give the source a test split"):
        make().setup("test")


def test_a_test_without_a_test_split_is_refused_in_plain_words(make):
    with pytest.raises(ConfigurationError, match="There are no rows to test on; give the source a test split"):
        trainer().test(Recorder(), datamodule=make())


def test_a_prediction_without_held_out_rows_is_refused(make):
    with pytest.raises(ConfigurationError, match="no rows to predict on; give the source a test or validation split"):
        make(validation_fraction=0.0).setup("predict")


def test_the_longest_row_counts_user_text_and_all_splits(make, tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [row(0), row(1, chosen="one two three four", user_text="six")])
    held_out = write_jsonl(tmp_path / "b.jsonl", [row(2), row(3, rejected="one " * 30)])
    assert make(FileSource(train)).longest_row == 1 + 3 + 5
    data = make(FileSource(train, validation=held_out), max_completion_length=20)
    assert data.longest_row == 3 + 20


def test_whether_any_row_has_a_text_about_its_user_is_known(make, votes, tmp_path):
    held_out = write_jsonl(tmp_path / "b.jsonl", [row(2, user_text=" "), row(3, user_text="six")])
    assert not make().has_user_text
    assert make(FileSource(votes, test=held_out)).has_user_text


def test_the_vocabulary_is_sorted_and_known_before_training(make):
    assert make(validation_fraction=0.0).vocabulary.ids == tuple(f"u{i}" for i in range(10))


def test_pairs_per_user_and_balance_reach_the_batches(make, tmp_path):
    rows = [row(i, user="many" if i < 60 else f"few{i % 3}") for i in range(66)]
    source = FileSource(write_jsonl(tmp_path / "uneven.jsonl", rows))
    data = make(source, validation_fraction=0.0, batch_size=4, pairs_per_user=4, balance=1.0)
    users = [user for batch in data.train_dataloader() for user in batch.user_ids]
    assert len(users) == 66
    assert 16 <= users.count("many") <= 17
    assert sum(a != b for a, b in pairwise(users)) < 45


def test_prompts_are_encoded_and_padded_as_the_data_are(make):
    data = make(validation_fraction=0.0)
    tokens = data.encode_prompts(["w0 w0", "one two three"])
    assert tokens.mask.sum(-1).tolist() == [3, 4]
    (first,) = (batch for batch in data.train_dataloader() if 0 in batch.records)
    assert tokens.ids[0, :3].tolist() == first.prompt.ids[first.records == 0][0].tolist()


def test_records_lead_back_to_their_lines(make, votes, tmp_path):
    data = make(FileSource(votes, validation=write_jsonl(tmp_path / "held.jsonl", [row(3, user="u1")])))
    batch = next(iter(data.train_dataloader()))
    for user, record in zip(batch.user_ids, batch.records.tolist(), strict=True):
        assert data.where(record) == f"{votes}:{record + 1}"
        assert user == f"u{record % 10}"
    assert data.where(0, "validate") == f"{tmp_path}/held.jsonl:1"


def test_the_summary_counts_pairs_users_and_what_was_cut(make, tmp_path):
    rows = [row(i, user="ann") for i in range(4)] + [row(4, user="bob", prompt="one two three four")]
    data = make(
        FileSource(write_jsonl(tmp_path / "a.jsonl", rows), validation=write_jsonl(tmp_path / "b.jsonl", rows[3:])),
        max_prompt_length=4,
    )
    assert data.describe() == (
        "Data: 5 training pairs by 2 users; pairs to validate on: 2 by seen users; "
        "1 train rows truncated ('prompt' too long); 1 validation rows truncated ('prompt' too long)."
    )


def test_the_summary_counts_pairs_that_truncation_made_equal(make, tmp_path):
    rows = [*ROWS[:4], row(5, chosen="one two three", rejected="one two four")]
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", rows))
    data = make(source, max_completion_length=2, ties="drop")
    assert "1 train rows left out (completions equal once tokenized and truncated)" in data.describe()
    assert data.batches_per_epoch() == 1


def test_the_summary_counts_texts_about_users(make, tmp_path):
    rows = [row(i, user_text="six" if i else None) for i in range(5)]
    data = make(FileSource(write_jsonl(tmp_path / "a.jsonl", rows)), validation_fraction=0.0)
    assert "4 train rows with a text about the user" in data.describe()


def test_one_prompt_for_all_can_only_be_split_by_pair(make, tmp_path):
    rows = [row(user=f"u{i % 3}", prompt="two", chosen=f"w{i % 40}", rejected=f"w{i // 40} two") for i in range(80)]
    source = FileSource(write_jsonl(tmp_path / "jokes.jsonl", rows))
    told = make(source, validation_fraction=0.1).describe()
    assert "no rows of seen users to validate on: there is only one prompt, which is in training; set split" in told
    data = make(source, validation_fraction=0.1, split_by="pair")
    assert data.eval_sets["validate"] == ("seen",)


def test_a_seen_set_that_holds_nothing_is_told_with_the_reason(make, tmp_path):
    lone = FileSource(write_jsonl(tmp_path / "lone.jsonl", [row(i, user=f"u{i}") for i in range(40)]))
    told = make(lone, validation_fraction=0.2).describe()
    assert "no rows of seen users to validate on: each of them has only one row" in told
    assert "raise it" not in told
    few = FileSource(write_jsonl(tmp_path / "few.jsonl", [row(i, user="ann") for i in range(3)]))
    assert "held out none of their 3 different prompts" in make(few, validation_fraction=1e-6).describe()


def test_holding_out_everything_is_refused(make, tmp_path):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", [row(0)]))
    with pytest.raises(ConfigurationError, match=r"All 1 training rows were held out.*1 different prompts and 1 users"):
        make(source, validation_fraction=0.999999).setup("fit")


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_fraction": 1.0},
        {"unseen_user_fraction": -0.1},
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"balance": 2.0},
        {"num_workers": -1},
        {"max_tokens_per_batch": 0},
        {"max_user_text_length": 0},
        {"seed": -1},
        {"split_by": "prompts"},
        {"overlong": "cut"},
        {"ties": "keep"},
        {"validation_fraction": float("nan")},
    ],
)
def test_impossible_settings_are_refused(make, settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        make(**settings)


def test_a_trainer_that_would_replace_the_sampler_is_refused(make):
    data = make()
    data.trainer = trainer(strategy="ddp", devices=2)
    with pytest.raises(ConfigurationError, match=r"set trainer\.use_distributed_sampler: false"):
        data.setup("fit")
    data.trainer = trainer(strategy="ddp", devices=2, use_distributed_sampler=False)
    data.setup("fit")


def test_a_tokenizer_can_be_given_by_its_path(make, tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    by_path = make(tokenizer=str(tmp_path / "tokenizer"))
    assert next(iter(by_path.val_dataloader()[0])).prompt.ids[0, 0] == 1


def test_a_missing_tokenizer_is_refused(votes, tmp_path):
    with pytest.raises(ConfigurationError, match="has no tokenizer"):
        PreferenceDataModule(FileSource(votes), cache_dir=tmp_path).setup("fit")


def test_a_bad_row_stops_training_by_name_before_it_starts(make, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [*ROWS[:16], row(0, user=7.5)])
    with pytest.raises(FeedbackFormatError, match=r"bad\.jsonl:17: field 'user_id' is of type float"):
        trainer().fit(Recorder(), datamodule=make(FileSource(path)))


def test_conversations_are_batched_like_strings(make, tmp_path):
    ask = {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": word} for word in ("one", "two three")]
    rows = [{"user_id": "a", "chosen": [ask, answers[0]], "rejected": [ask, answers[1]]}]
    source = FileSource(write_jsonl(tmp_path / "chat.jsonl", rows))
    data = make(source, word_tokenizer(template=CHATML), validation_fraction=0.0)
    (batch,) = data.train_dataloader()
    assert batch.chosen.mask.sum() == 2
    assert batch.rejected.mask.sum() == 3


def test_supervised_data_has_empty_rejected_rows(make, tmp_path):
    rows = [{"user_id": "a", "prompt": "one", "chosen": "two"}]
    source = FileSource(write_jsonl(tmp_path / "sft.jsonl", rows))
    (batch,) = make(source, validation_fraction=0.0, feedback="demonstrations").train_dataloader()
    assert batch.rejected.ids.shape == (1, 0)


@pytest.mark.parametrize(("count", "places"), [(3, [0, 9, 19]), (100, list(range(20))), (0, [])])
def test_a_sample_is_spread_over_the_validation_pairs(make, count, places):
    data = make(validation_fraction=0.2, split_by="pair")
    rows = [record for batch in data.val_dataloader()[0] for record in batch.records.tolist()]
    assert data.sample(count).records.tolist() == [rows[place] for place in places]


def test_without_validation_pairs_a_sample_is_empty(make):
    assert len(make(validation_fraction=0.0).sample(3)) == 0


THUMBS = [
    {"user_id": f"u{i % 3}", "prompt": f"w{i}", "completion": ["one", "two three", "one four five"][i % 3],
     "label": i % 2 == 0} for i in range(12)
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_thumbs_are_batched_with_one_completion_a_row(make, tmp_path, streaming):
    source = FileSource(write_jsonl(tmp_path / "thumbs.jsonl", THUMBS))
    settings = {"feedback": "thumbs", "validation_fraction": 0.0, "batch_size": 12, "streaming": streaming}
    data = make(source, **settings)
    assert data.describe().startswith("Data: 12 training thumbs by ")
    (batch,) = data.train_dataloader()
    lengths = torch.tensor([[2, 3, 4][record % 3] for record in batch.records.tolist()])
    assert batch.desirable.tolist() == [record % 2 == 0 for record in batch.records.tolist()]
    assert torch.equal(batch.completion.mask.sum(1), lengths)
    assert torch.equal(batch.chosen.mask.sum(1) + batch.rejected.mask.sum(1), lengths)


def test_thumbs_in_a_csv_file_and_in_conversations_are_read(make, tmp_path):
    (tmp_path / "a.csv").write_text("user_id,prompt,completion,label\nann,w1,one two,true\nann,w2,three,FALSE\n")
    settings = {"feedback": "thumbs", "validation_fraction": 0.0, "batch_size": 2}
    (batch,) = make(FileSource(tmp_path / "a.csv"), **settings).train_dataloader()
    assert sorted(zip(batch.desirable.tolist(), batch.completion.mask.sum(1).tolist(), strict=True)) == [
        (False, 2),
        (True, 3),
    ]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two"}]
    source = FileSource(
        write_jsonl(tmp_path / "a.jsonl", [{"user_id": "ann", "completion": turns, "label": False}] * 2)
    )
    (batch,) = make(source, word_tokenizer(template=CHATML), **settings).train_dataloader()
    assert not batch.desirable.any()
    assert batch.completion.mask.sum(1).tolist() == [3, 3]


def test_a_thumb_over_a_limit_is_named_by_its_own_field(make, tmp_path):
    source = FileSource(write_jsonl(tmp_path / "thumbs.jsonl", THUMBS))
    with pytest.raises(FeedbackFormatError, match=r"thumbs.jsonl:2: field 'completion' has 3 tokens, limit 2"):
        make(source, feedback="thumbs", max_completion_length=2, overlong="error").prepare_data()


def test_a_sample_of_thumbs_has_liked_completions_only(make, tmp_path):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", THUMBS), write_jsonl(tmp_path / "b.jsonl", THUMBS))
    sample = make(source, feedback="thumbs").sample(12)
    assert len(sample) == 6
    assert sample.desirable.all()


TURNS = [
    {**plain, "prompt": [{"role": "user", "content": plain["prompt"]}]}
    | {name: [{"role": "assistant", "content": plain[name]}] for name in ("chosen", "rejected")}
    for plain in ROWS
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "conversational"),
    [(ROWS, False), (TURNS, True), (TURNS[:60] + ROWS[60:], True), (ROWS[:60] + TURNS[60:], False)],
    ids=["strings", "conversations", "mostly conversations", "mostly strings"],
)
def test_a_plain_prompt_is_written_as_the_training_rows_are(make, tmp_path, rows, conversational, streaming):
    tokenizer = word_tokenizer(template=CHATML)
    data = make(FileSource(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, streaming=streaming)
    assert data.conversational == conversational
    turn = tokenizer.apply_chat_template(TURNS[0]["prompt"], add_generation_prompt=True, return_dict=False)
    expected = turn if conversational else tokenizer(ROWS[0]["prompt"])["input_ids"]
    assert data.encode_prompts([ROWS[0]["prompt"]]).ids.tolist() == [expected]


@pytest.mark.parametrize("chat_template", [False, True])
def test_plain_rows_for_a_chat_model_are_told(tmp_path, chat_template, recwarn):
    path = write_jsonl(tmp_path / "votes.jsonl", [row(i) for i in range(8)])
    tokenizer = word_tokenizer(template=CHATML)
    data = PreferenceDataModule(
        FileSource(path), tokenizer=tokenizer, cache_dir=tmp_path / "cache", chat_template=chat_template
    )
    data.prepare_data()
    data.setup("fit")
    assert any("set data.chat_template to true" in str(one.message) for one in recwarn) is not chat_template
