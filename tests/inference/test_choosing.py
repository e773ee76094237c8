"""The next token, drawn by each text's own settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.inference.engine import sample_tokens


def one(logits, temperature, top_p, chance) -> int:
    values = (torch.tensor([value], dtype=torch.float64) for value in (temperature, top_p, chance))
    return int(sample_tokens(torch.tensor([logits]), *values)[0])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probs = torch.tensor([0.1, 0.6, 0.3])
    draws = [one(probs.log().tolist(), 1.0, 1.0, (i + 0.5) / 1000) for i in range(1000)]
    assert torch.bincount(torch.tensor(draws)).tolist() == [100, 600, 300]


@pytest.mark.parametrize(("top_p", "shares"), [(0.5, [0, 9, 0]), (0.61, [0, 6, 3]), (0.9, [0, 6, 3])])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_have_it(top_p, shares):
    logits = torch.tensor([0.1, 0.6, 0.3]).log().tolist()
    draws = [one(logits, 1.0, top_p, (i + 0.5) / 9) for i in range(9)]
    assert torch.bincount(torch.tensor(draws), minlength=3).tolist() == shares


def test_temperature_divides_the_logits():
    logits = [0.0, 2.0]  # at temperature 2: shares 1 and e
    draws = [one(logits, 2.0, 1.0, (i + 0.5) / 1000) for i in range(1000)]
    assert draws.count(1) == round(1000 * torch.sigmoid(torch.tensor(1.0)).item())


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6),
    st.floats(0, 1e3),
    st.floats(1e-9, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_any_settings_choose_a_token_that_exists(logits, temperature, top_p, chance):
    assert 0 <= one(logits, temperature, top_p, chance) < len(logits)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_do_not_reach_other_texts(bad):
    logits, ones = torch.tensor([[bad] * 3, [0.0, 9.0, 0.0]]), torch.ones(2, dtype=torch.float64)
    assert sample_tokens(logits, ones, ones, ones / 2)[1] == 1
