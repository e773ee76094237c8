import os
from unittest.mock import Mock

import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from feedback_helpers import row, write_jsonl

from prlhf_lightning.data import FileSource, HubSource
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


def test_files_are_read_in_order_each_row_after_its_place(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [row(0), row(1)])
    b = write_jsonl(tmp_path / "b.jsonl", [row(2)])
    source = FileSource(train=[a, b], test=str(b))
    assert source.splits() == {"train", "test"}
    assert list(source.rows("train")) == [(f"{a}:1", row(0)), (f"{a}:2", row(1)), (f"{b}:1", row(2))]


def test_the_fingerprint_changes_with_content_and_time(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
    source = FileSource(path)
    prints = [source.fingerprint("train")]
    assert source.fingerprint("train") == prints[0]
    write_jsonl(path, [row(0), row(1)])
    prints.append(source.fingerprint("train"))
    os.utime(path, ns=(1, 1))
    prints.append(source.fingerprint("train"))
    assert len(set(prints)) == 3


def test_a_missing_file_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(FeedbackFormatError, match=r"a\.jsonl: there is no such file"):
        FileSource(tmp_path / "a.jsonl").fingerprint("train")


def test_an_empty_list_of_files_is_refused():
    with pytest.raises(ConfigurationError, match="The train split is an empty list of files"):
        FileSource([])


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "votes"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [row(0, worker="ann"), row(1, worker="bob")])
    write_jsonl(folder / "test.jsonl", [row(2, worker="eve")])
    return folder


def test_a_data_set_is_read_through_datasets(hub_folder):
    source = HubSource(str(hub_folder), test_split="test", columns={"user_id": "worker"})
    assert source.splits() == {"train", "test"}
    assert source.columns == {"user_id": "worker"}
    places, rows = zip(*source.rows("train"), strict=True)
    assert places == (f"{hub_folder}[train]:1", f"{hub_folder}[train]:2")
    assert [r["worker"] for r in rows] == ["ann", "bob"]


def test_a_data_set_can_be_streamed(hub_folder):
    stored, streamed = HubSource(str(hub_folder)), HubSource(str(hub_folder), streaming=True)
    assert list(streamed.rows("train")) == list(stored.rows("train")) == list(streamed.rows("train"))
    assert streamed.fingerprint("train") != HubSource(str(hub_folder), streaming=True, revision="b").fingerprint(
        "train"
    )


def test_a_data_sets_fingerprint_changes_with_its_files(hub_folder):
    before = HubSource(str(hub_folder)).fingerprint("train")
    assert HubSource(str(hub_folder)).fingerprint("train") == before
    write_jsonl(hub_folder / "train.jsonl", [row(2, worker="ann")])
    assert HubSource(str(hub_folder)).fingerprint("train") != before


def test_an_unknown_split_is_refused_with_those_that_exist(hub_folder):
    with pytest.raises(ConfigurationError, match=r"Unknown split \"valid\"\. Should be one of \['train', 'test'\]"):
        HubSource(str(hub_folder), train_split="valid").fingerprint("train")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub"),
        DatasetNotFoundError("Dataset 'some/votes' doesn't exist on the Hub or cannot be accessed."),
        DatasetGenerationError("An error occurred while generating the dataset"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_a_data_set_that_fails_to_load_is_named_with_its_split(monkeypatch, error):
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=error))
    source = HubSource("some/votes", "english", train_split="judged")
    with pytest.raises(ConfigurationError, match="'some/votes', split 'judged' of configuration 'english'") as caught:
        source.fingerprint("train")
    assert str(error) in str(caught.value)
    assert "check the name, split and revision, the network" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./votes", "there is no such folder"),
        ("data/of/mine", "there is no such folder"),
        ("data/votes.jsonl", "there is no such file"),
        ("a.jsonl", "it is a file, not a folder"),
        ("empty", "the folder holds no data"),
    ],
)
def test_the_hub_is_not_asked_for_a_mistyped_path(tmp_path, monkeypatch, name, says):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [row(0)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=f"Data set '{name}', .*: {says}.* read by FileSource"):
        HubSource(name).fingerprint("train")


def test_a_path_beside_a_folder_asks_the_hub_with_a_warning(hub_folder, monkeypatch):
    monkeypatch.chdir(hub_folder.parent.parent)
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("away")))
    name = f"{hub_folder.parent.name}/votse"
    with pytest.warns(UserWarning, match=f"no folder {name}"), pytest.raises(ConfigurationError, match="away"):
        HubSource(name).fingerprint("train")


def test_a_builder_is_no_place(tmp_path):
    files = {"train": str(write_jsonl(tmp_path / "a.jsonl", [row(0)]))}
    assert len(list(HubSource("json", data_files=files).rows("train"))) == 1


def test_a_broken_file_of_a_data_set_is_no_stack_trace(hub_folder):
    (hub_folder / "train.jsonl").write_text('{"user_id": \n')
    with pytest.raises(ConfigurationError, match="split 'train': cannot be loaded"):
        HubSource(str(hub_folder)).fingerprint("train")


def test_a_path_through_a_file_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(FeedbackFormatError, match=r"b\.jsonl: cannot be read"):
        FileSource(path / "b.jsonl").fingerprint("train")
