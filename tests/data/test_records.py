import json
import re

import pytest
from feedback_helpers import ASK, BAD, GOOD, row, turn

from prlhf_lightning.data import FileSource
from prlhf_lightning.data.holdout import count
from prlhf_lightning.data.privacy import PseudonymousSource, Pseudonyms
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError


def without(name):
    return {key: value for key, value in row().items() if key != name}


def test_a_good_row_becomes_a_record():
    record = parse_record(row(user="7", user_text="likes tea", extra=1), "f:1")
    assert (record.user_id, record.prompt, record.chosen, record.rejected, record.user_text) == (
        "7",
        "w0 w0",
        "one two",
        "three four",
        "likes tea",
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(user_id=7.5), "field 'user_id' is of type float; write it as a string"),
        (row(user_id=["a"]), "field 'user_id' is of type list"),
        (row(user_id=True), "field 'user_id' is of type bool"),
        (row(user_id=" "), "field 'user_id' is empty"),
        (row(user_id=None), "field 'user_id' is null (column 'user_id'); fill it or drop the row"),
        (row(prompt=None), "field 'prompt' is null"),
        (row(prompt=["Hi"]), "field 'prompt' message 1 is of type str; each message is"),
        (row(chosen=""), "field 'chosen' is empty"),
        (row(rejected=" \n"), "field 'rejected' is empty"),
        (row(rejected="one two"), "field 'chosen' equals 'rejected'"),
        (row(chosen=5), "field 'chosen' is of type int; write a string or a list of messages"),
        (row(rejected=None), "field 'rejected' is null"),
        (row(rejected=[BAD]), "field 'rejected' and 'chosen' must both be strings or both be lists"),
        (row(user_text=5), "field 'user_text' is of type int; write a string, or null"),
        (row(chosen="a\ud83d"), "field 'chosen' holds U+D83D, half of a surrogate pair; remove it"),
        (without("rejected"), "field 'rejected' is missing: there is no column 'rejected'"),
    ],
)
def test_a_bad_row_is_refused_by_place_field_and_fix(bad, message):
    with pytest.raises(FeedbackFormatError, match="^" + re.escape(f"votes.jsonl:17: {message}")):
        parse_record(bad, "votes.jsonl:17")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": [], "rejected": []}, "field 'chosen' is an empty list"),
        ({"chosen": [{"role": "assistant"}]}, "field 'chosen' message 1 has a 'content' that is missing"),
        ({"chosen": [{"content": "x"}]}, "field 'chosen' message 1 has a 'role' that is missing"),
        ({"chosen": [turn("assistant", None)]}, "field 'chosen' message 1 has a 'content' that is of type NoneType"),
        ({"chosen": [ASK]}, "field 'chosen' must be one assistant message after the prompt, not messages by: user"),
        ({"chosen": [turn("assistant", " ")]}, "field 'chosen' is empty"),
        ({"prompt": [ASK, GOOD]}, "field 'prompt' ends with an assistant message"),
        ({"rejected": [GOOD]}, "field 'chosen' equals 'rejected'"),
    ],
)
def test_a_malformed_conversation_is_refused(changes, message):
    bad = {"user_id": "a", "prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], **changes}
    with pytest.raises(FeedbackFormatError, match=re.escape(f"f:1: {message}")):
        parse_record(bad, "f:1")


def test_roles_of_real_templates_pass_and_others_are_warned_of(recwarn):
    def parse(role):
        raw = {"user_id": "a", "prompt": [ASK, turn(role, "x"), ASK], "chosen": [GOOD], "rejected": [BAD]}
        assert parse_record(raw, "f:1").prompt[1]["role"] == role

    for role in ("system", "developer", "assistant", "tool", "function", "ipython"):
        parse(role)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the role 'narrator', which few chat templates know; usual ones are system,"):
        parse("narrator")


def test_a_misspelt_column_is_named_with_the_right_mapping():
    bad = {**without("chosen"), "choosen": "one"}
    with pytest.raises(FeedbackFormatError, match=re.escape("set columns: {chosen: choosen}")):
        parse_record(bad, "f:1")


def test_columns_can_have_other_names():
    raw = {**without("user_id"), "worker": "bob"}
    assert parse_record(raw, "f:1", Columns.from_mapping({"user_id": "worker"})).user_id == "bob"


def test_a_column_of_user_texts_that_was_named_must_exist():
    columns = Columns.from_mapping({"user_text": "profile"})
    assert parse_record(row(profile=None), "f:1", columns).user_text is None
    with pytest.raises(FeedbackFormatError, match=re.escape("f:1: field 'user_text' is missing")):
        parse_record(row(profiles="likes tea"), "f:1", columns)


def test_an_unknown_field_in_a_mapping_suggests_the_close_one():
    with pytest.raises(ConfigurationError, match="did you mean 'user_id'"):
        Columns.from_mapping({"userid": "worker"})


def test_supervised_rows_need_no_rejected_completion():
    for raw in (without("rejected"), row(rejected=None), row(rejected="")):
        assert parse_record(raw, "f:1", feedback="demonstrations").rejected is None


def test_blank_user_text_is_no_user_text():
    assert parse_record(row(user_text="  "), "f:1").user_text is None


def test_a_prompt_inside_conversations_is_split_off():
    raw = {"user_id": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    record = parse_record(raw, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == ([ASK], [GOOD], [BAD])


def test_a_string_prompt_must_be_a_message_of_the_conversation():
    raw = {"user_id": "a", "prompt": "Hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    assert parse_record(raw, "f:1").prompt == [ASK]
    with pytest.raises(FeedbackFormatError, match="no message of the conversation"):
        parse_record({**raw, "prompt": "Bye"}, "f:1")


def test_conversations_that_part_early_are_refused():
    raw = {"user_id": "a", "chosen": [ASK, GOOD], "rejected": [turn("user", "Bye"), BAD]}
    with pytest.raises(FeedbackFormatError, match="field 'rejected' must share all but its last message"):
        parse_record(raw, "f:1")


def test_bare_completions_without_a_prompt_column_are_refused():
    with pytest.raises(FeedbackFormatError, match="field 'prompt' is missing"):
        parse_record({"user_id": "a", "chosen": [GOOD], "rejected": [BAD]}, "f:1")


def thumb(**changes):
    return {"user_id": "ann", "prompt": "w1", "completion": "one two", "label": True, **changes}


@pytest.mark.parametrize("label", [True, "true", "True ", 1, "1", 1.0, "1.0", "+1", "up", "good", "Thumbs up", "👍"])
def test_a_thumb_up_means_chosen_and_a_thumb_down_rejected(label):
    up = parse_record(thumb(label=label), "f:1", feedback="thumbs")
    down = parse_record(thumb(label=False, user_text="likes tea"), "f:1", feedback="thumbs")
    assert (up.chosen, up.rejected) == ("one two", None)
    assert (down.chosen, down.rejected, down.user_text) == (None, "one two", "likes tea")


def test_the_completion_of_a_thumb_may_be_a_whole_conversation():
    record = parse_record(
        {"user_id": "ann", "completion": [ASK, GOOD, ASK, BAD], "label": False}, "f:1", feedback="thumbs"
    )
    assert (record.prompt, record.chosen, record.rejected) == ([ASK, GOOD, ASK], None, [BAD])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (thumb(label=None), "field 'label' is null (column 'label'); fill it or drop the row"),
        (thumb(label=2), "field 'label' is 2, of type int; write true (or 1) for a thumbs-up and false (or 0) for"),
        (thumb(label="meh"), "field 'label' is 'meh', of type str; write true"),
        (thumb(completion=" "), "field 'completion' is empty"),
        (thumb(completion=5), "field 'completion' is of type int; write a string or a list of messages"),
        (thumb(prompt=[ASK], completion=[ASK]), "field 'completion' must be one assistant message after the prompt"),
        ({"user_id": "ann", "prompt": "w1", "text": "a", "label": True}, "field 'completion' is missing: there is no"),
        (
            row(),
            "field 'completion' is missing: the row is a pair, which another loss takes, such as DPOLoss; or write",
        ),
    ],
)
def test_a_bad_thumb_is_refused_by_place_field_and_fix(bad, message):
    with pytest.raises(FeedbackFormatError, match="^" + re.escape(f"votes.jsonl:17: {message}")):
        parse_record(bad, "votes.jsonl:17", feedback="thumbs")


def test_a_thumb_among_pairs_is_called_one():
    with pytest.raises(FeedbackFormatError, match="'chosen' is missing: the row is a thumb up or down, where a"):
        parse_record(thumb(), "f:1")


@pytest.mark.parametrize("ids", [[7, 7, 10**20], ["7", "7", str(10**20)]])
def test_whole_number_ids_read_the_same_from_every_format(tmp_path, ids):
    rows = [row(user_id=user_id) for user_id in ids]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source, hidden = FileSource(path), Pseudonyms(b"0123456789abcdef")
    assert count(source, "train").rows == {"7": 2, str(10**20): 1}
    assert [row["user_id"] for _, row in source.scan("train")] == ["7", "7", str(10**20)]
    assert count(PseudonymousSource(source, hidden), "train").rows == {hidden("7"): 2, hidden(str(10**20)): 1}


def test_a_file_under_another_path_is_another_source(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()))
    monkeypatch.chdir(tmp_path)
    assert FileSource("a.jsonl").fingerprint("train") != FileSource(tmp_path / "a.jsonl").fingerprint("train")
