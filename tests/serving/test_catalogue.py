"""Whom the list of users shows to whom."""

from __future__ import annotations

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.serving.auth import APIKey
from prlhf_lightning.serving.models_routes import UserDirectory

TEXT = st.text("ab-李", max_size=4)


@given(st.sets(TEXT), TEXT, st.text("ab-李*?[]!", max_size=4))
def test_those_are_listed_who_begin_so_and_for_whom_the_key_is(ids, prefix, pattern):
    key = APIKey("", "", pattern)
    found = UserDirectory().find(tuple(ids), prefix, key)
    assert list(found) == sorted(one for one in ids if one.startswith(prefix) and key.may_act_for(one))


def test_a_user_who_was_learned_meanwhile_is_listed():
    directory, key = UserDirectory(), APIKey("", "")
    assert list(directory.find(("bob",), "", key)) == ["bob"]
    assert list(directory.find(("bob", "ann"), "", key)) == ["ann", "bob"]


def test_of_many_users_only_those_that_fit_the_key_are_checked():
    ids = tuple(f"user-{number:05}" for number in range(10_000))
    with mock.patch.object(APIKey, "may_act_for", return_value=True) as looked_at:
        assert list(UserDirectory().find(ids, "", APIKey("", "", "user-0001*"))) == list(ids[10:20])
    assert looked_at.call_count == 10
