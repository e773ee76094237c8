"""Several files, sources and sorts of labels as one."""

import pytest
from feedback_helpers import row, write_jsonl

from prlhf_lightning.data import (
    CombinedSource,
    DataSource,
    FeedbackLogSource,
    FileSource,
    HubSource,
    LabelSource,
    PoolSource,
)
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


def read(source: DataSource, split="train", feedback="pairs"):
    columns = Columns.from_mapping(source.columns)
    return [parse_record(raw, where, columns, feedback) for where, raw in source.rows(split)]


def users(source, split="train"):
    return [record.user_id for record in read(source, split)]


def test_a_pattern_and_a_folder_name_all_their_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"votes-{name}.jsonl", [row(0, name)])
    (tmp_path / "notes.txt").write_text("no data")
    assert users(FileSource(tmp_path)) == users(FileSource(f"{tmp_path}/votes-*.jsonl")) == ["a", "b", "c"]
    assert users(FileSource([f"{tmp_path}/votes-[ab].jsonl", tmp_path / "votes-c.jsonl"])) == ["a", "b", "c"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    assert users(FileSource(write_jsonl(tmp_path / "a[1].jsonl", [row(0, "ann")]))) == ["ann"]


def test_patterns_without_files_or_of_many_splits_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no file matches"):
        FileSource(f"{tmp_path}/*.jsonl")
    with pytest.raises(ConfigurationError, match="the folder holds no"):
        FileSource(tmp_path)
    for name in ("train-0.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / name, [row()])
    with pytest.raises(ConfigurationError, match=r"files of several splits .* such as train: .*train"):
        FileSource(tmp_path)


@pytest.fixture
def two(tmp_path):
    """A file in its own columns, with validation, and a server's log."""
    rows = [{"worker": "ann", **{k: v for k, v in row(i).items() if k != "user_id"}} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    log = FeedbackLog(f"sqlite:///{tmp_path}/log.db")
    log.append(Feedback("", "1", 0.0, "bob", "w1", "one", "two"))
    log.close()
    file = FileSource(path, validation=path, columns={"user_id": "worker"})
    return file, FeedbackLogSource(f"sqlite:///{tmp_path}/log.db")


def test_combined_sources_have_all_rows_each_in_its_columns(two):
    source = CombinedSource(two)
    assert users(source) == ["ann"] * 4 + ["bob"]
    assert users(source, "validation") == ["ann"] * 4
    assert source.splits() == {"train", "validation"}


def test_weights_say_how_often_training_rows_are_read(two):
    source = CombinedSource(two, weights=[0.5, 3])
    assert users(source)[-3:] == ["bob"] * 3
    assert users(source) == users(source)
    many = CombinedSource([FileSource("x")], weights=[2.25])
    assert sum(many._times(2.25, "x", number) for number in range(4000)) == pytest.approx(9000, rel=0.02)
    assert users(source, "validation") == ["ann"] * 4
    left_out = source.counts("train").get("left out (by the weight of their source)", 0)  # by chance none
    assert users(source).count("ann") + left_out == 4


def test_what_is_combined_is_part_of_the_fingerprint(two):
    prints = {CombinedSource(two, weights=weights).fingerprint("train") for weights in (None, [1, 2], [2, 1])}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("settings", "message"), [({"sources": []}, "empty list"), ({"weights": [1]}, "1 weights for 2")]
)
def test_senseless_settings_of_combined_sources_are_refused(two, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        CombinedSource(**{"sources": two, **settings})


def thumbs(tmp_path, labels):
    rows = [{"user_id": "ann", "prompt": "p", "completion": "c", "stars": label} for label in labels]
    return FileSource(write_jsonl(tmp_path / "thumbs.jsonl", rows), columns={"label": "stars"})


@pytest.mark.parametrize(
    ("labels", "settings", "up"),
    [
        ([1, 2, 4, 5], {"up_from": 4}, [False, False, True, True]),
        (["5", "3", "1"], {"up_from": 4, "down_to": 2}, [True, False]),
        (["Great", "meh", "great "], {"up": ["great"], "down": ["meh"]}, [True, False, True]),
        ([1, 2], {"up": [1], "down": [2]}, [True, False]),
        (["2.0", "1"], {"up": [2], "down": [1]}, [True, False]),
    ],
)
def test_labels_of_any_sort_become_thumbs(tmp_path, labels, settings, up):
    source = LabelSource(thumbs(tmp_path, labels), **settings)
    assert [record.chosen is not None for record in read(source, feedback="thumbs")] == up
    assert sum(source.counts("train").values()) == len(labels) - len(up)
    assert Inspector(source, "thumbs", min_votes=0)().splits["train"].accepted == len(up)


def test_another_label_is_refused_by_place_and_fix(tmp_path):
    source = LabelSource(thumbs(tmp_path, ["great", "so so"]), up=["great"], down=["bad"])
    with pytest.raises(FeedbackFormatError, match=r"thumbs.jsonl:2: field 'label' is 'so so', .* write one of"):
        list(source.rows("train"))
    report = Inspector(source, "thumbs", min_votes=0)()
    assert (report.splits["train"].accepted, report.splits["train"].rejected) == (1, 1)


@pytest.mark.parametrize("settings", [{}, {"up": ["a"]}, {"up": ["a"], "down": ["A"]}, {"up_from": 2, "down_to": 3}])
def test_labels_that_mean_nothing_or_both_are_refused(tmp_path, settings):
    with pytest.raises(ConfigurationError, match="LabelSource: "):
        LabelSource(thumbs(tmp_path, ["a"]), **settings)


@pytest.mark.parametrize("folder", [False, True])
def test_csv_ids_and_texts_stay_as_written_through_datasets(tmp_path, folder):
    ids = ["007", "7", "1e3", "null", "NA", "yes"]
    lines = ["user_id,prompt,chosen,rejected", *(f"{one},null,NA,nan" for one in ids)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("\n".join(lines) + "\n")
    files = {} if folder else {"data_files": {"train": f"{tmp_path}/data/train.csv"}}
    records = read(HubSource(f"{tmp_path}/data" if folder else "csv", **files))
    assert [record.user_id for record in records] == ids
    assert {(record.prompt, record.chosen, record.rejected) for record in records} == {("null", "NA", "nan")}


def test_columns_of_a_pool_can_have_other_names(tmp_path):
    rows = [{"question": f"q{i}", "answers": ["short", "a longer one"]} for i in range(20)]
    path = write_jsonl(tmp_path / "pool.jsonl", rows)
    names = {"prompt": "question", "responses": "answers"}
    source = PoolSource(path, [{"characters": 1}], votes_per_user=3, validation_votes_per_user=1, columns=names)
    assert {record.chosen for record in read(source)} == {"a longer one"}
    with pytest.raises(ConfigurationError, match="a pool has prompt and responses"):
        PoolSource(path, [{"characters": 1}], columns={"user_id": "x"})
