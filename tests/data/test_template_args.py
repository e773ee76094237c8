"""Arguments and dates of chat templates: given once, the same for rows and for prompts to be answered."""

import datetime

import pytest
from feedback_helpers import byte_tokenizer, write_jsonl
from test_families import QUESTION, conversation, encode, templated
from tokenizer_families import family

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.errors import ConfigurationError

DATED = (
    "{% set day = strftime_now('%d %b %Y') %}{{ '<|im_start|>system\nToday is ' + day + '.<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def later(monkeypatch):
    """Returns a function that moves both clocks, the package's and the templates', some days on."""

    class Date(datetime.date):
        days = 0

        @classmethod
        def today(cls):
            return datetime.date.today() + datetime.timedelta(cls.days)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(Date.days)

    def move(days):
        Date.days = days

    monkeypatch.setattr("prlhf_lightning.data.tokenization.date", Date)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    return move


def written(day):
    return day.strftime("Today is %d %b %Y.")


@pytest.mark.parametrize("thinks", [True, False])
def test_arguments_reach_the_chat_template(thinks):
    tokenizer, answer = family("qwen-3"), {"role": "assistant", "content": "sleep early"}
    row = encode(tokenizer, conversation([QUESTION]), chat_template_args={"enable_thinking": thinks})
    whole = templated(tokenizer, [QUESTION, answer], enable_thinking=thinks)
    assert row.prompt.tolist() == templated(tokenizer, [QUESTION], add_generation_prompt=True, enable_thinking=thinks)
    assert [*row.prompt, *row.chosen] == whole[: len(row.prompt) + len(row.chosen)]
    assert ("<think>" in tokenizer.decode(row.chosen)) == thinks


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            {"enable_thinkin": False},
            "'enable_thinkin' has no effect, as the tokenizer's chat template does not read it",
        ),
        ({"tools": []}, "'tools' is no argument that can be set here"),
        ({"enable_thinking": {1, 2}}, "give numbers, strings, true"),
    ],
)
def test_arguments_that_could_have_no_effect_are_refused(args, told):
    with pytest.raises(ConfigurationError, match=told):
        FeedbackTokenizer(family("qwen-3"), TokenizationSettings(chat_template_args=args))


def test_arguments_without_a_template_are_refused():
    with pytest.raises(ConfigurationError, match="chat template is missing"):
        FeedbackTokenizer(family("gpt-2"), TokenizationSettings(chat_template_args={"enable_thinking": False}))


def test_a_day_must_be_one():
    with pytest.raises(ConfigurationError, match="chat_template_date is '30 Nov'; write a day such as"):
        TokenizationSettings(chat_template_date="30 Nov")


def test_a_date_in_a_template_is_the_same_on_every_day(later):
    tokenizer = family("chatml", DATED)
    settings = TokenizationSettings().dated(tokenizer)
    first = datetime.date.today()
    assert settings.chat_template_date == first.isoformat()
    later(40)
    prompt = FeedbackTokenizer(tokenizer, settings).prompts([[QUESTION]])[0]
    assert written(first) in tokenizer.decode(prompt)
    anew = FeedbackTokenizer(tokenizer, TokenizationSettings()).prompts([[QUESTION]])[0]
    assert written(first + datetime.timedelta(40)) in tokenizer.decode(anew)


def test_a_template_without_a_date_has_none():
    assert TokenizationSettings().dated(family("chatml")).chat_template_date is None


def test_cached_rows_and_prompts_keep_their_date_on_later_days(tmp_path, later):
    tokenizer = family("chatml", DATED)
    answers = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"user_id": "ann", "prompt": [QUESTION], **answers}] * 4)
    for days in (0, 40):
        later(days)
        data = PreferenceDataModule(FileSource(str(rows)), tokenizer, cache_dir=tmp_path / "c", validation_fraction=0)
        data.prepare_data()
        told = written(datetime.date.today() + datetime.timedelta(days))
        (batch, *_) = data.train_dataloader()
        assert told in tokenizer.decode(batch.prompt.ids[0])
        assert told in tokenizer.decode(data.encode_prompts([[QUESTION]]).ids[0])
        assert data.settings.chat_template_date == (datetime.date.today() + datetime.timedelta(days)).isoformat()
    data.use_template_date("2020-01-31")
    assert "Today is 31 Jan 2020." in tokenizer.decode(next(iter(data.train_dataloader())).prompt.ids[0])


def test_a_checkpoints_date_does_not_replace_a_set_one(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [])
    data = PreferenceDataModule(FileSource(str(rows)), family("chatml", DATED), chat_template_date="2021-02-03")
    data.use_template_date("2020-01-31")
    assert data.settings.chat_template_date == "2021-02-03"


@pytest.mark.parametrize(("template", "says"), [("{% if 1 %}\n{{ m.content ", "line 2"), ("{{ 1 | no }}", "'no'")])
def test_a_template_that_is_no_jinja_is_refused_by_name(template, says):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigurationError, match=f"chat template .* is no valid Jinja: .*{says}"):
        FeedbackTokenizer(tokenizer, TokenizationSettings())


@pytest.mark.parametrize(
    "written_as", ["%F", "%e %B", "%D %T %R", "%h %-d, %C", "%k|%s|%n", "%d %b %Y", "%%d %%%d", "%^b"]
)
@pytest.mark.parametrize("start", ["", "\n", "  {% set x = 1 %}"])
def test_every_date_format_gives_what_that_days_clock_gives(written_as, start):
    template = start + DATED.replace("%d %b %Y", written_as)
    told = datetime.datetime(2026, 1, 5).strftime(written_as)
    on_that_day = family("chatml", template.replace(f"strftime_now('{written_as}')", repr(told)))
    tokenizer = family("chatml", template)
    ids = encode(tokenizer, conversation([QUESTION]), chat_template_date="2026-01-05").prompt
    assert ids.tolist() == templated(on_that_day, [QUESTION], add_generation_prompt=True)
