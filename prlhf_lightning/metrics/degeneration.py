"""Metrics of degenerate text: repetition."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of repeated n-grams in a text; 0 for a text of fewer than n tokens.

    seq-rep-n of Welleck et al., arXiv:1908.04319: one minus the number of distinct n-grams over the number of n-grams.

    Args:
        tokens: Token ids of the text.
        n: Length of an n-gram in tokens.
    """
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
