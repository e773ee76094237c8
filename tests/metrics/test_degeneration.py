"""Repetition, by hand."""

from __future__ import annotations

import pytest

from prlhf_lightning.metrics import repeated_ngrams


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1, 1, 1, 1, 1, 1], 4, 2 / 3),  # three 4-grams, one kind
        ([1, 2, 1, 2, 1], 2, 1 / 2),  # 12 21 12 21
        ([1, 2, 3], 4, 0.0),
        ([], 4, 0.0),
    ],
)
def test_the_share_of_ngrams_that_stood_before(tokens, n, share):
    assert repeated_ngrams(tokens, n) == pytest.approx(share)
