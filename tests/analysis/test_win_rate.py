"""Means over users with intervals."""

from __future__ import annotations

import math

import pytest

from prlhf_lightning.analysis.win_rate import user_mean


def test_users_weigh_the_same_however_many_values_they_have():
    found = user_mean(["ann", "bob", "bob", "bob"], [1.0, 0.0, 0.5, 0.1])
    assert (found.value, found.users, found.count) == (pytest.approx((1 + 0.2) / 2), 2, 4)


def test_the_interval_is_of_users_and_not_of_values():
    few = user_mean(["ann", "bob"] * 500, [1.0, 0.0] * 500)
    many = user_mean([f"user {i}" for i in range(1000)], [1.0, 0.0] * 500)
    assert (few.low, few.high) == (0.0, 1.0)
    assert 0.45 < many.low < 0.5 < many.high < 0.55


def test_values_that_are_not_known_count_neither_way():
    found = user_mean(["ann", "ann", "bob"], [1.0, math.nan, math.nan])
    assert (found.value, found.users, found.count) == (1.0, 1, 1)
    assert math.isnan(found.low)


def test_of_nothing_nothing_is_known():
    assert math.isnan(user_mean(["ann"], [math.nan]).value)
