import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.simulation.grammar import MAX_WORDS, PROMPTS, STYLES, Style, parse, render, sample

PROMPT = "How do I cook rice?"
ANSWER = "Great question! Just rinse it well. Also cover the pot. Want more ideas?"


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


@given(st.sampled_from(PROMPTS), st.sampled_from(STYLES), st.integers())
def test_parse_inverts_render(prompt, style, seed):
    assert parse(prompt, render(prompt, style, Random(seed))) == style


def test_parse_reads_a_known_answer():
    assert parse(PROMPT, ANSWER) == Style("medium", "casual", "warm", "sure", "open")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("Just rinse it well", id="no full stop"),
        pytest.param("Just  rinse it well.", id="two spaces"),
        pytest.param("Just rinse it well. ", id="space at the end"),
        pytest.param("Just rinse it well.Also cover the pot.", id="no space between sentences"),
        pytest.param("Just knead the dough well.", id="tip on another topic"),
        pytest.param("Just rinse it well. Also rinse it well.", id="same tip twice"),
        pytest.param("Just cover the pot.", id="tip of another place"),
        pytest.param("Just rinse it well. Furthermore, cover the pot.", id="two registers"),
        pytest.param("Just rinse it well. Or maybe cover the pot.", id="two certainties"),
        pytest.param("Thank you for asking. Just rinse it well.", id="opening of another register"),
        pytest.param("Also cover the pot. Just rinse it well.", id="frames out of order"),
        pytest.param("Just rinse it well. Oh, and let it rest.", id="frame left out"),
        pytest.param("Great question!", id="no tip"),
        pytest.param("Want more ideas? Just rinse it well.", id="offer first"),
        pytest.param("Great question! Great question! Just rinse it well.", id="two openings"),
        pytest.param("Just rinse it well. Want more ideas? Want more ideas?", id="two offers"),
        pytest.param(ANSWER + " Just", id="runs on"),
    ],
)
def test_parse_refuses_what_render_cannot_write(text):
    assert parse(PROMPT, text) is None


def test_parse_refuses_an_unknown_prompt():
    assert parse("How do I cook rice", "Just rinse it well.") is None


@given(st.data())
def test_a_dropped_or_doubled_word_changes_what_is_read(data):
    text = sample(PROMPT, Random(data.draw(st.integers())))
    parts = text.split(" ")
    place = data.draw(st.integers(0, len(parts) - 1))
    assert parse(PROMPT, " ".join(parts[: place + 1] + parts[place:])) is None


def test_scores_of_each_attribute_are_symmetric_about_zero():
    assert [sum(scores) for scores in zip(*(style.scores for style in STYLES), strict=True)] == [0.0] * 5


def test_no_answer_is_longer_than_stated():
    lengths = [len(words(render(prompt, style, Random(0)))) for prompt in PROMPTS for style in STYLES]
    assert MAX_WORDS - 4 <= max(lengths) <= MAX_WORDS
