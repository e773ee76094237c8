"""Tools and tool calls: written by the chat template as by itself, or refused by name, and never left out."""

import json

import pytest
from feedback_helpers import byte_tokenizer, write_jsonl
from transformers import GenerationConfig

from prlhf_lightning.cli import generate
from prlhf_lightning.cli.data_convert import convert_source
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.checks import Inspector
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.errors import FeedbackFormatError
from prlhf_lightning.utils.chat_tokens import remember_end_tokens

CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {"at": "sun"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}<eos>{% endfor %}"
CALLS = PLAIN.replace("<eos>", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>")
END = "{% if add_generation_prompt %}[assistant]{% endif %}"
KNOWS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CALLS + END
# As Zephyr's: a role that it does not know is left out without a word.
ONLY_THREE_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}]{{ m.content or '' }}<eos>"
    "{% endif %}{% endfor %}" + END
)


def row(content=None, **changes):
    prompt = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "look"},
    ]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Warm"), ("rejected", "?"))}
    return {"user_id": "ann", "prompt": prompt, **answers, "tools": TOOLS, **changes}


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokens(template, raw):
    (record,) = FeedbackTokenizer(with_template(template), TokenizationSettings())([parse_record(raw, "f:1")], ["f:1"])
    return record


@pytest.mark.parametrize("raw", [row(), row(""), row("I look."), row(tools=json.dumps(TOOLS)), row(tools=None)])
def test_tools_and_calls_are_written_as_in_the_template(raw):
    tools = TOOLS if raw["tools"] else None
    text = with_template(KNOWS_TOOLS).apply_chat_template(
        raw["prompt"], tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert with_template(KNOWS_TOOLS).decode(tokens(KNOWS_TOOLS, raw).prompt) == text


def test_an_answer_that_calls_a_tool_is_one():
    chosen = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    ids = tokens(KNOWS_TOOLS, row(prompt=[{"role": "user", "content": "How warm?"}], chosen=chosen)).chosen
    assert with_template(KNOWS_TOOLS).decode(ids) == json.dumps([CALL]) + "<eos>"


@pytest.mark.parametrize(
    ("template", "raw", "message"),
    [
        (CALLS + END, row(), "field 'tools' is left out by the tokenizer's chat template"),
        (PLAIN + END, row(tools=None), "field 'prompt' message 2 has tool calls, which are left out"),
        (
            ONLY_THREE_ROLES,
            row(tools=None, prompt=[{"role": "user", "content": "a"}, {"role": "tool", "content": "21"}]),
            "field 'prompt' message 2, of the role 'tool', is left out",
        ),
        (
            PLAIN + END,
            row("", tools=None, prompt=[{"role": "user", "content": "a"}],
                chosen=[{"role": "assistant", "content": "b", "tool_calls": [CALL]}]),
            "field 'chosen' message 1 has tool calls, which are left out",
        ),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused_by_name(tmp_path, template, raw, message):
    with pytest.raises(FeedbackFormatError, match=f"^f:1: {message}"):
        tokens(template, raw)
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", [raw]))
    report = Inspector(source, tokenizer=with_template(template))()
    assert not report.ok


THINKS = PLAIN.replace("{{ m.content", "{{ m.reasoning_content or '' }}{{ m.content")


def with_thought(**thoughts):
    answer = {"role": "assistant", "content": "Warm", **thoughts}
    return row(prompt=[{"role": "user", "content": "How warm?"}], tools=None, rejected=[answer])


@pytest.mark.parametrize(
    "names", [["reasoning_content"], ["reasoning"], ["thinking"], ["reasoning_content", "reasoning"]]
)
def test_thoughts_of_an_answer_are_written_or_refused_by_name(names):
    raw = with_thought(**dict.fromkeys(names, "21. "))
    assert with_template(THINKS).decode(tokens(THINKS + END, raw).rejected) == "21. Warm<eos>"
    with pytest.raises(FeedbackFormatError, match=f"^f:1: field 'rejected' is an assistant .* '{names[0]}', .*content"):
        tokens(PLAIN + END, raw)


def test_thoughts_under_an_unread_name_suggest_the_right_one():
    with pytest.raises(FeedbackFormatError, match=r"has 'thought', .* rename it to 'reasoning_content'"):
        tokens(THINKS + END, with_thought(thought="21. "))


def test_templates_may_leave_out_thoughts_of_earlier_turns():
    earlier = {"role": "assistant", "content": "Warm", "thinking": "It is 21."}
    ask = {"role": "user", "content": "How warm?"}
    assert len(tokens(PLAIN + END, row(prompt=[ask, earlier, ask], tools=None)).prompt)


def test_tools_of_a_plain_prompt_also_use_the_chat_template():
    raw = row(prompt="How warm?", chosen="Warm", rejected="?")
    text = with_template(KNOWS_TOOLS).apply_chat_template(
        [{"role": "user", "content": "How warm?"}], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert with_template(KNOWS_TOOLS).decode(tokens(KNOWS_TOOLS, raw).prompt) == text


def test_prompts_to_be_answered_have_their_tools():
    tokenizer = with_template(KNOWS_TOOLS)
    messages = [{"role": "user", "content": "How warm?"}]
    (ids,) = FeedbackTokenizer(tokenizer, TokenizationSettings()).prompts([messages], TOOLS)
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == text


def test_prompts_of_a_file_keep_their_tools(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row()["prompt"], "tools": json.dumps(TOOLS)}])
    (asked,) = generate._rows(path)
    assert (asked["prompt"], asked["tools"]) == (row()["prompt"], TOOLS)
    with pytest.raises(FeedbackFormatError, match=r"prompts.jsonl:1: field 'tools' is no list of tools"):
        list(generate._rows(write_jsonl(path, [{"prompt": "a", "tools": "hammer"}])))


@pytest.mark.parametrize(("raw", "held"), [(row(), "tools"), (row(tools=None), "tool_calls")])
def test_convert_refuses_tools_that_parquet_columns_cannot_hold(tmp_path, raw, held):
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", [raw]))
    with pytest.raises(FeedbackFormatError, match=f"holds {held}, which these columns have no place for"):
        convert_source(source, tmp_path / "out")


@pytest.mark.parametrize("place", ["key", "role"])
def test_names_and_roles_write_no_control_tokens(place):
    forged = "x<eos>"
    call = {**CALL, "function": {"name": "look", "arguments": {forged if place == "key" else "x": "sun"}}}
    raw = row("", tools=None)
    raw["prompt"][1]["tool_calls"] = [call]
    raw["prompt"][2]["role"] = forged if place == "role" else "tool"
    honest, ids = tokens(KNOWS_TOOLS, row("", tools=None)).prompt, tokens(KNOWS_TOOLS, raw).prompt
    end = with_template(KNOWS_TOOLS).eos_token_id
    assert ids.tolist().count(end) == honest.tolist().count(end)
    assert forged in with_template(KNOWS_TOOLS).decode(ids)


def test_a_tool_call_ends_with_the_generation_configs_end():
    tokenizer = with_template(CALLS.replace("<eos>", "{% if m.tool_calls %}<call>{% else %}<eos>{% endif %}") + END)
    tokenizer.add_tokens(["<call>"])
    remember_end_tokens(tokenizer, GenerationConfig(eos_token_id=[tokenizer.convert_tokens_to_ids("<call>")]))
    raw = row(chosen=[{"role": "assistant", "content": "", "tool_calls": [CALL]}], tools=None)
    (ids,) = FeedbackTokenizer(tokenizer, TokenizationSettings())([parse_record(raw, "f:1")], ["f:1"])
    whole = tokenizer.apply_chat_template([*raw["prompt"], *raw["chosen"]], tokenize=True, return_dict=False)
    assert [*ids.prompt, *ids.chosen] == whole


def test_printed_mappings_keep_their_control_tokens():
    template = CALLS.replace("m.tool_calls | tojson", "m.tool_calls") + END
    raw = row("", tools=None)
    raw["prompt"][1]["tool_calls"] = [{**CALL, "function": {"name": "look", "arguments": {"at": "<eos>"}}}]
    prompt, tokenizer = tokens(template, raw).prompt, with_template(template)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        raw["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert prompt.tolist().count(tokenizer.eos_token_id) == 3
