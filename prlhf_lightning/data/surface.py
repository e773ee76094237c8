"""What can be counted in a text without understanding it."""

from __future__ import annotations

import math
import re

#: What `surface_features` returns, in order; and how to say to a reader what an answer has more of.
SURFACE_FEATURES = {
    "words (log)": "more words",
    "word length": "longer words (more formal)",
    "sentences (log)": "more sentences",
    "question marks (log)": "more questions",
    "exclamation marks (log)": "more exclamation marks",
    "line breaks (log)": "more lines",
    "list items (log)": "more list items",
    "emoji (log)": "more emoji",
    "digits (log)": "more digits",
    "share of its words in the prompt": "more of the prompt's words",
}

# Scripts that are written without spaces: a character counts as a word.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Vowel signs and accents that stand apart from their letters, which are no word characters to `re`.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:[^\W{_NO_SPACES}]|[{_MARKS}])+")
_SENTENCE_END = re.compile("[.!?\u2026\u061f\u06d4\u0964]+(?=\\s|$)|[\u3002\uff01\uff1f]+")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+\u2022\u2023\u25e6\u2013]|\(?\d{1,3}[.)]|\(?[A-Za-z]\))[ \t]+\S", re.MULTILINE)
_EMOJI = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
_QUESTION, _EXCLAMATION = re.compile("[?\uff1f\u061f]"), re.compile("[!\uff01]")


def count_words(text: str) -> int:
    """Return the number of words of a text: runs of letters, digits and underscores, or characters of Chinese etc."""
    return len(_WORD.findall(text))


def surface_features(prompt: str, response: str) -> tuple[float, ...]:
    """Return the value of each of `SURFACE_FEATURES` for a response to a prompt."""
    words = _WORD.findall(response.lower())
    distinct = set(words)
    in_prompt = len(distinct.intersection(_WORD.findall(prompt.lower())))
    counts = (
        len(_SENTENCE_END.findall(response)),
        len(_QUESTION.findall(response)),
        len(_EXCLAMATION.findall(response)),
        response.count("\n"),
        len(_LIST_ITEM.findall(response)),
        len(_EMOJI.findall(response)),
        sum(map(str.isdigit, response)),
    )
    return (
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        *map(math.log1p, counts),
        in_prompt / max(1, len(distinct)),
    )
