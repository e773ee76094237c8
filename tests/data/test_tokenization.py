import pytest
from feedback_helpers import CHATML, byte_tokenizer, word_tokenizer

from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TextIds, TokenizationSettings, tokenizer_identity
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

PLAIN = FeedbackRecord("ann", "one two three", "four five", "six")
CHAT = FeedbackRecord(
    "ann",
    [{"role": "user", "content": "Hi"}],
    [{"role": "assistant", "content": "one two"}],
    [{"role": "assistant", "content": "three"}],
)


def encode(record, tokenizer, **settings):
    return FeedbackTokenizer(tokenizer, TokenizationSettings(**settings))([record], ["f:1"])[0]


def words(ids, tokenizer):
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


@pytest.mark.parametrize(
    ("bos", "eos_too", "prompt"),
    [(True, False, "<bos> one two three"), (False, False, "one two three"), (True, True, "<bos> one two three")],
)
def test_bos_is_where_the_tokenizer_writes_it_and_eos_is_last(bos, eos_too, prompt):
    tokenizer = word_tokenizer(bos, eos_too)
    row = encode(PLAIN, tokenizer)
    assert words(row.prompt, tokenizer) == prompt
    assert words(row.chosen, tokenizer) == "four five <eos>"
    assert words(row.rejected, tokenizer) == "six <eos>"
    assert not len(row.user_text)


def test_a_tokenizer_without_bos_reproduces_every_byte():
    tokenizer = byte_tokenizer()
    row = encode(FeedbackRecord("a", "naïve\n", " café ☕", "x"), tokenizer)
    assert tokenizer.decode(row.prompt) == "naïve\n"
    assert tokenizer.decode(row.chosen) == " café ☕<eos>"


def test_supervised_records_have_no_rejected_ids():
    assert not len(encode(FeedbackRecord("a", "one", "two"), word_tokenizer()).rejected)


def test_user_text_is_written_in_its_format():
    tokenizer = word_tokenizer()
    record = FeedbackRecord("a", "one", "two", "three", user_text="four {five}")
    row = encode(record, tokenizer, user_text_format="about {user_text} user:")
    assert words(row.user_text, tokenizer) == "about four <unk> user:"


def test_a_conversation_is_written_by_the_chat_template():
    tokenizer = word_tokenizer(template=CHATML)
    row = encode(CHAT, tokenizer)
    whole = tokenizer.apply_chat_template(CHAT.prompt + CHAT.chosen, tokenize=False)
    assert words(row.prompt, tokenizer) == "<|start|> <unk> Hi <eos> <|start|> <unk>"
    assert words(row.chosen, tokenizer) == "one two <eos>"
    assert [*row.prompt, *row.chosen] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_bos_written_by_the_template_is_not_doubled():
    tokenizer = word_tokenizer(template="{{ bos_token }} " + CHATML)
    assert words(encode(CHAT, tokenizer).prompt, tokenizer).startswith("<bos> <|start|>")


def test_plain_strings_are_put_in_the_template_only_on_request():
    tokenizer = word_tokenizer(template=CHATML)
    record = FeedbackRecord("ann", "Hi", "one two", "three")
    assert words(encode(record, tokenizer).prompt, tokenizer) == "<bos> Hi"
    wrapped, chat = encode(record, tokenizer, chat_template=True), encode(CHAT, tokenizer)
    assert all(list(a) == list(b) for a, b in zip(wrapped, chat, strict=True))


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{% for m in messages %}{{ loop.length }} {{ m.content | upper }} {% endfor %}"
    with pytest.raises(ConfigurationError, match=r"f:1: chosen: .*does not render a conversation as its prompt"):
        encode(CHAT, word_tokenizer(template=template))


def test_a_template_that_refuses_the_roles_names_the_row():
    template = "{{ raise_exception('no users, please') }}"
    with pytest.raises(FeedbackFormatError, match=r"f:1: field 'prompt' .*no users, please"):
        encode(CHAT, word_tokenizer(template=template))


@pytest.mark.parametrize("settings", [{}, {"chat_template": True}])
def test_a_conversation_needs_a_tokenizer_with_a_template(settings):
    with pytest.raises(ConfigurationError, match="has no chat template"):
        encode(CHAT, word_tokenizer(), **settings)


def test_truncation_keeps_bos_and_the_end_of_a_prompt():
    tokenizer = word_tokenizer()
    record = FeedbackRecord("a", "one two three four", "one two three", "four", "five six one")
    row = encode(record, tokenizer, max_prompt_length=3, max_completion_length=2, max_user_text_length=2)
    assert words(row.prompt, tokenizer) == "<bos> three four"
    assert words(row.chosen, tokenizer) == "one two"  # cut short, so no EOS is pretended
    assert words(row.rejected, tokenizer) == "four <eos>"
    assert words(row.user_text, tokenizer) == "five six"


def test_without_bos_the_whole_limit_is_the_prompts_end():
    tokenizer = word_tokenizer(bos=False)
    assert words(encode(PLAIN, tokenizer, max_prompt_length=2).prompt, tokenizer) == "two three"


def test_rows_at_their_limits_are_left_alone_and_uncounted():
    tokenize = FeedbackTokenizer(word_tokenizer(), TokenizationSettings(4, 3, 1, overlong="error"))
    assert [len(ids) for ids in tokenize([PLAIN], ["f:1"])[0]] == [0, 4, 3, 2]
    assert not tokenize.excess


def test_overlong_rows_are_counted_with_the_first_place():
    tokenize = FeedbackTokenizer(word_tokenizer(), TokenizationSettings(max_prompt_length=2))
    tokenize([FeedbackRecord("a", "one", "two"), PLAIN, PLAIN], ["f:1", "f:2", "f:3"])
    assert tokenize.excess["prompt"].count == 2
    assert tokenize.excess["prompt"].first == "f:2: field 'prompt' has 4 tokens, limit 2"


def test_overlong_rows_can_be_dropped():
    tokenize = FeedbackTokenizer(word_tokenizer(), TokenizationSettings(max_completion_length=2, overlong="drop"))
    kept = tokenize([PLAIN, FeedbackRecord("a", "one", "two", "three")], ["f:1", "f:2"])
    assert [row is not None for row in kept] == [False, True]
    assert tokenize.excess["chosen"].count == 1


def test_overlong_rows_can_be_an_error_that_names_the_setting():
    with pytest.raises(FeedbackFormatError, match=r"f:1: field 'chosen' has 3 tokens, limit 2; raise max_completion_"):
        encode(PLAIN, word_tokenizer(), max_completion_length=2, overlong="error")


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(FeedbackFormatError, match="f:1: field 'prompt' has no tokens"):
        encode(FeedbackRecord("a", "", "one", "two"), word_tokenizer(bos=False))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="has no EOS token"):
        FeedbackTokenizer(tokenizer, TokenizationSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_prompt_length": 1}, "max_prompt_length is 1; it must be at least 2"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"user_text_format": "about"}, "must contain {user_text}"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        encode(PLAIN, word_tokenizer(), **settings)


def test_anothers_padding_changes_neither_ids_nor_identity():
    tokenizer = word_tokenizer()
    identity, ids = tokenizer_identity(tokenizer), encode(PLAIN, tokenizer).prompt.tolist()
    tokenizer(["one", "one two"], padding="max_length", truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == identity
    assert encode(PLAIN, tokenizer).prompt.tolist() == ids


def test_the_identity_covers_vocabulary_specials_and_template():
    tokenizers = [word_tokenizer(), word_tokenizer(bos=False), word_tokenizer(template=CHATML), byte_tokenizer()]
    assert len({tokenizer_identity(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)
    assert tokenizer_identity(word_tokenizer()) == tokenizer_identity(word_tokenizer())


def test_prompts_to_be_answered_are_encoded_as_those_of_records():
    tokenizer = word_tokenizer(template=CHATML)
    tokenize = FeedbackTokenizer(tokenizer, TokenizationSettings(max_prompt_length=3))
    for record in (PLAIN, CHAT):
        assert tokenize.prompts([record.prompt])[0].tolist() == tokenize([record], ["f:1"])[0].prompt.tolist()


def test_short_texts_leave_the_cache_before_it_fills_memory(monkeypatch):
    monkeypatch.setattr("prlhf_lightning.data.tokenization._CACHE_BYTES", 1_000_000)
    ids = TextIds(word_tokenizer())
    for start in range(0, 20_000, 1000):
        ids.make_room()
        ids.learn(f"w{number}" for number in range(start, start + 1000))
    assert len(ids) <= 6000  # at 200 bytes and more each


@pytest.mark.parametrize(
    ("written", "kept"),
    [("four <eos> <eos>", "four <eos>"), ("four <eos> five <eos>", "four <eos> five <eos>"), ("four", "four <eos>")],
)
def test_of_several_ends_in_a_row_the_first_ends_a_completion(written, kept):
    tokenizer = word_tokenizer()
    assert words(encode(FeedbackRecord("a", "one", written, "six"), tokenizer).chosen, tokenizer) == kept
