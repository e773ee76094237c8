"""Signs that written text falls apart."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of a text's n-grams that stood in it before; 0 for a text of fewer than n tokens.

    seq-rep-n of Welleck et al., arXiv:1908.04319: one less the number of distinct n-grams over their number.

    Args:
        tokens: Token ids of the text.
        n: Tokens of an n-gram.
    """
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
