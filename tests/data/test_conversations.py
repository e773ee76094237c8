"""Conversations in the forms in which strangers' data hold them, against what the data say and against TRL."""

import copy
import json
import re

import pytest
from feedback_helpers import ASK, BAD, GOOD, row, turn
from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from prlhf_lightning.data.records import Columns, TieError, parse_record
from prlhf_lightning.errors import FeedbackFormatError

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sun"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
PLAIN = {"user_id": "ann", "prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


def read(**changes):
    return parse_record({key: value for key, value in (PLAIN | changes).items() if value is not ...}, "f:1")


@pytest.mark.parametrize("written", [json.dumps, repr, lambda messages: json.dumps(messages, indent=2)])
def test_messages_written_as_text_are_read_as_messages(written):
    record = read(prompt=written([ASK]), chosen=written([GOOD]), rejected=written([BAD]))
    assert (record.prompt, record.chosen, record.rejected) == ([ASK], [GOOD], [BAD])


@pytest.mark.parametrize("text", ['[{"x": 1}]', '{"role": "admin"}', "[1, 2]", '["a"]', "{'role'} is a set", "[{"])
def test_other_texts_in_brackets_stay_texts(text):
    assert parse_record(row(chosen=text), "f:1").chosen == text


def renamed(role, content):
    return lambda one: {role: one["role"], content: one["content"]}


@pytest.mark.parametrize(
    "change",
    [
        renamed("Role", "Content"),
        renamed("from", "content"),
        renamed("role", "value"),
        renamed("speaker", "text"),
        lambda one: [one["role"], one["content"]],
    ],
)
@pytest.mark.parametrize("written", [list, json.dumps, lambda messages: json.dumps(json.dumps(messages))])
def test_foreign_message_formats_are_read_where_roles_are_known(change, written):
    prompt, chosen, rejected = (written([change(one)]) for one in (ASK, GOOD, BAD))
    record = read(prompt=prompt, chosen=chosen, rejected=rejected)
    assert (record.prompt, record.chosen, record.rejected) == ([ASK], [GOOD], [BAD])


def test_messages_may_be_json_lines_after_a_byte_order_mark():
    text = "\ufeff" + "\n".join(json.dumps(one) for one in (ASK, GOOD, ASK))
    assert read(prompt=text).prompt == [ASK, GOOD, ASK]


@pytest.mark.parametrize(
    "response",
    [
        {"id": "x", "choices": [{"index": 0, "message": GOOD}]},
        {"choices": [{"text": "one"}]},
        {
            "output": [
                {"type": "reasoning"},
                {"type": "message", **turn("assistant", [{"type": "output_text", "text": "one"}])},
            ]
        },
        {"model": "m", "message": GOOD, "done": True},
        {"candidates": [{"content": {"role": "model", "parts": [{"text": "one"}]}}]},
    ],
    ids=["chat completion", "completion", "response", "ollama", "gemini"],
)
def test_responses_of_apis_are_the_message_that_they_hold(response):
    assert read(chosen=response).chosen == read(chosen=json.dumps(response)).chosen == [GOOD]


def test_a_response_with_several_choices_is_refused():
    with pytest.raises(FeedbackFormatError, match="f:1: field 'chosen' is an API's response with 2 choices; keep"):
        read(chosen=json.dumps({"choices": [{"message": GOOD}, {"message": BAD}]}))


def test_messages_without_known_roles_stay_text_with_a_warning():
    text = json.dumps([{"speaker": "Hamlet", "text": "To be"}])
    with pytest.warns(UserWarning, match="Field 'chosen' holds text that is JSON of objects with 'speaker', 'text'"):
        assert parse_record(row(chosen=text), "f:1").chosen == text


def test_messages_as_numpy_prints_them_are_refused_with_the_fix():
    text = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'one'}]"
    with pytest.raises(FeedbackFormatError, match=r"f:1: field 'chosen' looks like a list .* json.dumps"):
        read(chosen=text)


def test_sharegpt_is_read_as_trl_converts_it():
    example = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "one"}]}
    theirs = maybe_convert_to_chatml(copy.deepcopy(example))["messages"]
    record = read(prompt=..., chosen=example["conversations"], rejected=[{"from": "human", "value": "Hi"}, BAD])
    assert record.prompt + record.chosen == [{**turn, "role": standard} for turn, standard in zip(
        theirs, ("user", "assistant"), strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "meant"),
    [("human", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant"), ("User", "user")],
)
def test_other_names_of_roles_are_read_as_those_of_templates(role, meant):
    assert read(prompt=[turn(role, "x"), turn("tool", "y")]).prompt[0] == turn(meant, "x")


def test_text_parts_are_joined_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert read(prompt=[turn("user", parts)]).prompt == [ASK]
    with pytest.raises(FeedbackFormatError, match="message 1 has a part of type 'image_url'; only text is supported"):
        read(prompt=[turn("user", [{"type": "image_url", "image_url": {"url": "x"}}])])


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Hi"},
        {"chosen": "one", "rejected": "two"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": GOOD, "rejected": BAD},
        {"prompt": {"messages": [ASK]}},
        {"prompt": "Hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_partly_conversational_rows_are_read_as_whole_ones(changes):
    record = read(**changes)
    assert (record.prompt, record.chosen, record.rejected) == ([ASK], [GOOD], [BAD])


def test_tools_and_calls_reach_the_record_unchanged():
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "look"}
    record = read(prompt=[ASK, calls, answer], tools=TOOLS)
    assert (record.prompt, record.tools) == ([ASK, calls, answer], TOOLS)
    assert read(tools=json.dumps(TOOLS)).tools == TOOLS
    assert read(chosen=[calls]).chosen == [calls]


def test_tools_that_are_none_are_refused_by_name():
    with pytest.raises(FeedbackFormatError, match="f:1: field 'tools' is no list of tools; write a list of JSON schem"):
        read(tools="hammer")


def test_a_named_system_column_becomes_the_first_message():
    columns = Columns.from_mapping({"system": "sys"})
    system = turn("system", "Be brief.")
    assert parse_record({**PLAIN, "sys": "Be brief."}, "f:1", columns).prompt == [system, ASK]
    plain = parse_record(row(prompt="Hi", chosen="one", rejected="two", sys="Be brief."), "f:1", columns)
    assert (plain.prompt, plain.chosen) == ([system, ASK], [GOOD])
    assert parse_record(row(sys=None), "f:1", columns).prompt == "w0 w0"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("\n\nHuman: Hi\n\nAssistant: one", "\n\nHuman: Hi\n\nAssistant: two"),
        ("Question: why is it so? Because.", "Question: why is it so? No idea."),
    ],
)
def test_a_prompt_inside_plain_answers_is_split_off_as_in_trl(chosen, rejected):
    record = parse_record({"user_id": "a", "chosen": chosen, "rejected": rejected}, "f:1")
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (record.prompt, record.chosen, record.rejected) == tuple(theirs[k] for k in ("prompt", "chosen", "rejected"))
    assert [note.field for note in record.notes] == ["prompt"]


def test_a_prompt_repeated_in_conversation_answers_is_left_out():
    ask = turn("user", "What helps to sleep well?")
    chosen, rejected = ([turn("assistant", f"{ask['content']} {text}")] for text in ("Tea.", "Walks."))
    assert read(prompt=[ask], chosen=chosen, rejected=rejected).chosen == [turn("assistant", " Tea.")]
    thumb = {"user_id": "a", "prompt": ask["content"], "completion": f"{ask['content']} Tea.", "label": 1}
    assert parse_record(thumb, "f:1", feedback="thumbs").chosen == " Tea."


def test_a_winner_may_stand_in_a_column_that_is_called_chosen():
    raw = {"user_id": "a", "prompt": "Hi", "response_a": "one", "response_b": "two", "chosen": "b"}
    assert parse_record(raw, "f:1", Columns.from_mapping({"winner": "chosen"})).chosen == "two"
    with pytest.raises(FeedbackFormatError, match=r"field 'winner' is missing: .* columns: \{winner: chosen\}"):
        parse_record(raw, "f:1")


def test_no_word_is_cut_where_answers_part():
    record = parse_record({"user_id": "a", "chosen": "The name of the river is Rhine", "rejected":
                           "The name of the river is Rhone"}, "f:1")  # fmt: skip
    assert (record.prompt, record.chosen) == ("The name of the river is", " Rhine")


def test_answers_that_share_little_need_a_prompt():
    with pytest.raises(FeedbackFormatError, match="f:1: field 'prompt' is missing"):
        parse_record({"user_id": "a", "chosen": "The cat", "rejected": "The dog"}, "f:1")
    with pytest.raises(FeedbackFormatError, match=r"columns: \{prompt: question\}"):
        parse_record({"user_id": "a", "question": "q", "chosen": "I like this", "rejected": "I like that"}, "f:1")


def test_a_prompt_repeated_in_both_answers_is_left_out_and_told():
    prompt = "What helps to sleep well?"
    record = parse_record(row(prompt=prompt, chosen=f"{prompt} Walks.", rejected=f"{prompt} Tea."), "f:1")
    assert (record.chosen, record.rejected) == (" Walks.", " Tea.")
    assert "stands again at the start of the answers" in record.notes[0].problem
    short = parse_record(row(prompt="I", chosen="I do", rejected="I do not"), "f:1")
    assert (short.chosen, short.notes) == ("I do", ())


@pytest.mark.parametrize(
    ("prompt", "start"),
    [("What helps to sleep? ", "What helps to sleep?\n"), (" What helps me sleep?\n", "What helps me sleep? ")],
)
@pytest.mark.parametrize("chat", [False, True])
def test_white_space_around_a_repeated_prompt_does_not_count(prompt, start, chat):
    ask = [turn("user", prompt)] if chat else prompt
    record = parse_record(row(prompt=ask, chosen=f"{start}Walks.", rejected=f"{start}Tea."), "f:1")
    texts = [record.chosen, record.rejected]
    assert ([text[0]["content"] for text in texts] if chat else texts) == ["Walks.", "Tea."]
    assert "stands again at the start of the answers" in record.notes[0].problem


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_repeated_in_one_answer_is_told_and_kept(chat):
    prompt = "What helps to sleep well?"
    ask = [turn("user", prompt)] if chat else prompt
    record = parse_record(row(prompt=ask, chosen="Walks.", rejected=f"{prompt} Tea."), "f:1")
    rejected = f"{prompt} Tea."
    assert record.rejected == ([turn("assistant", rejected)] if chat else rejected)
    assert ["start of one of the two answers" in note.problem for note in record.notes] == [True]


def arena(winner, **changes):
    columns = {"user_id": "ann", "prompt": "Hi", "response_a": "one", "response_b": "two", "winner": winner}
    return {**columns, **changes}


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [("a", "one"), ("model_a", "one"), ("A", "one"), ("response_b", "two"), ("B", "two"), (2, "two"), ("left", "one")],
)
def test_the_winner_of_two_responses_is_chosen(winner, chosen):
    record = parse_record(arena(winner), "f:1")
    assert (record.chosen, {record.chosen, record.rejected}) == (chosen, {"one", "two"})


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "Both", "draw"])
def test_two_responses_without_a_winner_are_a_tie(winner):
    with pytest.raises(TieError, match=r"f:1: field 'winner' is a tie \(column 'winner'\)"):
        parse_record(arena(winner), "f:1")


@pytest.mark.parametrize("winner", ["0", "gpt-4", None, ""])
def test_another_winner_is_refused_by_name(winner):
    with pytest.raises(FeedbackFormatError, match="f:1: field 'winner' is "):
        parse_record(arena(winner), "f:1")


def test_rows_of_chatbot_arena_and_kaggle_are_read():
    ours = Columns.from_mapping(
        {"user_id": "judge", "response_a": "conversation_a", "response_b": "conversation_b"})  # fmt: skip
    battle = {"judge": "arena_user_1", "model_a": "x", "model_b": "y", "winner": "model_b",
              "conversation_a": [ASK, GOOD], "conversation_b": [ASK, BAD]}  # fmt: skip
    record = parse_record(battle, "f:1", ours)
    assert (record.user_id, record.prompt, record.chosen) == ("arena_user_1", [ASK], [BAD])
    flags = {"winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"}
    kaggle = arena(..., prompt='["Hi"]', response_a='["one"]', response_b='["two"]', **flags)
    del kaggle["winner"]
    record = parse_record(kaggle, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == ("Hi", "two", "one")


@pytest.mark.parametrize(
    ("raw", "mapping"),
    [
        ({"judge": "a", "conversation_a": "x", "conversation_b": "y", "winner": "a"},
         "{user_id: judge, response_a: conversation_a, response_b: conversation_b}"),
        ({"user": "a", "conversations": [ASK], "chosen": GOOD, "rejected": BAD},
         "{user_id: user, prompt: conversations}"),
        ({"who": "a", "prompt": "p", "response_a": "x", "response_b": "y", "preference": "a"},
         "{user_id: <its name>, winner: preference}"),
        ({"user": "a", " prompt": "p", "Chosen": "x", "rejected": "y"},
         "{user_id: user, chosen: Chosen, prompt: ' prompt'}"),
        ({"worker": "a", "user_prompt": "p", "good": "x", "bad": "y"},
         "{user_id: worker, chosen: <its name>, rejected: <its name>, prompt: user_prompt}"),
    ],
)  # fmt: skip
def test_the_mapping_that_mends_missing_columns_is_written_out(raw, mapping):
    with pytest.raises(FeedbackFormatError, match=re.escape(f"as in columns: {mapping}.")):
        parse_record(raw, "f:1")


def test_a_whole_conversation_needs_no_column_for_the_prompt():
    with pytest.raises(FeedbackFormatError, match=r"field 'chosen' is missing: .* columns: \{chosen: messages\}"):
        parse_record({"user_id": "a", "messages": [ASK, GOOD]}, "f:1", feedback="demonstrations")


def test_all_missing_columns_are_told_at_once_with_candidates():
    with pytest.raises(FeedbackFormatError) as error:
        parse_record({"worker": "a", "question": "p", "choosen": "x", "worse": "y"}, "f:1")
    assert "'user_id', 'chosen', 'rejected' and 'prompt' are missing" in str(error.value)
    assert "columns: {user_id: worker, chosen: choosen, rejected: worse, prompt: question}" in str(error.value)


def kaggle(prompt, first, second):
    return arena("a", prompt=json.dumps(prompt), response_a=json.dumps(first), response_b=json.dumps(second))


def test_arena_rows_of_many_turns_or_without_text_are_refused():
    for fields in ((["Hi", "And?"], ["one", "1"], ["two", "2"]), (["Hi"], ["one", "1"], ["two"])):
        with pytest.raises(FeedbackFormatError, match=r"f:1: field '(prompt|response_a)' is a list of 2 turns.*keep"):
            parse_record(kaggle(*fields), "f:1")
    for fields in ((["Hi"], [None], ["two"]), (["Hi"], ["one"], []), ([None], ["one"], ["two"])):
        with pytest.raises(FeedbackFormatError, match=r"f:1: field '(prompt|response_[ab])' is a list without a text"):
            parse_record(kaggle(*fields), "f:1")


def test_a_json_list_that_answers_a_plain_prompt_stays_a_text():
    record = parse_record(kaggle(["Hi"], ["one"], ["two"]) | {"prompt": "A list!", "response_a": '["x", "y"]'}, "f:1")
    assert (record.chosen, record.rejected) == ('["x", "y"]', "two")
