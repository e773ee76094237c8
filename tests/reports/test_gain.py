"""The sentence about what personalization gains."""

from __future__ import annotations

import pytest

from prlhf_lightning.metrics import UserAccuracy
from prlhf_lightning.reports.gain import gain_sentence


def rows(*accuracies: float) -> list[tuple[str, UserAccuracy]]:
    return [(f"user{i}", UserAccuracy(i, 10, share, 0.0, 1.0, 0.0)) for i, share in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ((0.8, 0.9, 0.7), "Personalization gains: +20.0 ± 0.0 points of pair accuracy"),
        ((0.4, 0.5, 0.3), "Personalization does harm: -20.0 ± 0.0 points"),
        ((0.6, 0.7, 0.5), "Personalization gains nothing that the held-out data can show: +0.0 ± 0.0 points"),
        ((0.7, 0.9, 0.3), "Personalization gains nothing that the held-out data can show: +3.3 ± 23.6 points"),
    ],
)
def test_the_sentence_says_if_the_interval_is_clear_of_0(own, says):
    said = gain_sentence(rows(*own), rows(0.6, 0.7, 0.5))
    assert said.startswith(says)
    assert said.endswith("against the generic user (held-out data, 3 users).")


def test_a_single_user_shows_nothing():
    assert gain_sentence(rows(0.9), rows(0.5)) is None
