"""What can be counted in a text without understanding it."""

from __future__ import annotations

import math
import re

#: What `surface_features` returns, in order.
SURFACE_FEATURES = (
    "words (log)",
    "word length",
    "sentences (log)",
    "question marks (log)",
    "exclamation marks (log)",
    "line breaks (log)",
    "digits (log)",
    "share of its words in the prompt",
)

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?…]+(?=\s|$)")


def count_words(text: str) -> int:
    """Return the number of words of a text: of runs of letters, digits and underscores."""
    return len(_WORD.findall(text))


def surface_features(prompt: str, response: str) -> tuple[float, ...]:
    """Return the value of each of `SURFACE_FEATURES` for a response to a prompt."""
    words = _WORD.findall(response.lower())
    distinct = set(words)
    in_prompt = len(distinct.intersection(_WORD.findall(prompt.lower())))
    counts = (
        len(_SENTENCE_END.findall(response)),
        response.count("?"),
        response.count("!"),
        response.count("\n"),
        sum(map(str.isdigit, response)),
    )
    return (
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        *map(math.log1p, counts),
        in_prompt / max(1, len(distinct)),
    )
