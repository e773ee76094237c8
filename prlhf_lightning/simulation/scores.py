"""Scores of answers, for the utilities of simulated users; any function of prompt and answer can be a score."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

Score: TypeAlias = Callable[[str, str], float]
"""Maps prompt and answer to a finite number; its unit does not matter."""

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")


def characters(prompt: str, answer: str) -> float:
    """Return the length in characters; arXiv:2402.05133 simulates users for and against it on TL;DR."""
    return float(len(answer))


def words(prompt: str, answer: str) -> float:
    """Return the length in words."""
    return float(len(_WORD.findall(answer)))


def sentence_length(prompt: str, answer: str) -> float:
    """Return the mean number of words in a sentence."""
    return words(prompt, answer) / max(1, len(_SENTENCE_END.findall(answer)))


def word_length(prompt: str, answer: str) -> float:
    """Return the mean number of letters in a word."""
    found = _WORD.findall(answer)
    return sum(map(len, found)) / max(1, len(found))


def variety(prompt: str, answer: str) -> float:
    """Return the share of distinct words."""
    found = _WORD.findall(answer.lower())
    return len(set(found)) / max(1, len(found))


def lines(prompt: str, answer: str) -> float:
    """Return the number of non-blank lines; lists have many."""
    return float(sum(bool(line.strip()) for line in answer.splitlines()))


def excitement(prompt: str, answer: str) -> float:
    """Return the number of exclamation marks."""
    return float(answer.count("!"))


def echo(prompt: str, answer: str) -> float:
    """Return the share of the prompt's words that are in the answer."""
    asked = set(_WORD.findall(prompt.lower()))
    return len(asked & set(_WORD.findall(answer.lower()))) / max(1, len(asked))


#: Built-in scores by name.
SCORES: Mapping[str, Score] = {
    score.__name__: score
    for score in (characters, words, sentence_length, word_length, variety, lines, excitement, echo)
}
