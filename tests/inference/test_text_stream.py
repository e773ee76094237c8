"""Pieces of text add up to the text, and never show half a character or part of a stop string."""

from __future__ import annotations

from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prlhf_lightning.inference.engine import TextStream

BYTES = AutoTokenizer.from_pretrained(str(files("prlhf_lightning") / "assets" / "byte-lm"))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    words = ["<eos>", "<unk>", "▁a", "▁the", "▁cat", "s", ".", "▁", "at", "▁s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()  # writes no space before the first token of what it is given
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def written(tokenizer, ids, stop=()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


def encode(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_pieces_of_bytes_add_up_and_hold_whole_characters(text):
    ids = encode(text)
    pieces, _ = written(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=True)
    assert len(ids) >= len(text)
    assert text == "" or "\ufffd" in text or "\ufffd" not in "".join(pieces[:-1])


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=12))
def test_pieces_of_any_tokens_add_up_to_the_whole_text(ids):
    assert "".join(written(BYTES, ids)[0]) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_spaces_that_depend_on_the_last_token_are_the_same(ids):
    tokenizer = sentencepiece_like()
    assert "".join(written(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 9), max_size=5), st.lists(st.integers(0, 9), max_size=12))
def test_a_text_that_continues_others_begins_with_their_space(before, ids):
    tokenizer = sentencepiece_like()
    stream = TextStream(tokenizer, before=before)
    text = "".join([*(stream.push(token) for token in ids), stream.finish()])
    whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (before + ids, before))
    assert start + text == whole


@given(st.text("abé", max_size=14), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_its_first_stop_string(text, stop):
    pieces, stopped = written(BYTES, encode(text), stop)
    shown = "".join(pieces)
    assert stopped == any(word in text for word in stop)
    assert text.startswith(shown)
    assert not any(word in shown for word in stop)
    assert text[len(shown) :].startswith(tuple(stop)) if stopped else shown == text


def test_a_possible_stop_string_is_held_back_until_certain():
    stream = TextStream(BYTES, ("abc",))
    assert [stream.push(token) for token in encode("xababd")] == ["x", "", "", "ab", "", "abd"]


@pytest.mark.parametrize("text", ["é", "日本", "🦤"])
def test_a_cut_off_character_is_shown_as_decoding_shows_it(text):
    ids = encode(text)[:-1]
    pieces, _ = written(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids)
    assert pieces[-1].endswith("\ufffd")
