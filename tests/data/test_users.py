import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError

IDS = st.lists(st.text(min_size=1), unique=True)


@given(IDS)
def test_known_users_have_rows_from_one_in_the_given_order(ids):
    vocabulary = UserVocabulary(ids)
    assert vocabulary.rows(ids).tolist() == list(range(1, len(ids) + 1))
    assert len(vocabulary) == len(ids) + 1


def test_an_unknown_user_is_the_generic_user():
    vocabulary = UserVocabulary(["ann", "bob"])
    assert vocabulary.rows(["bob", "eve", "ann"]).tolist() == [2, 0, 1]
    assert "ann" in vocabulary
    assert "eve" not in vocabulary


@given(IDS)
def test_a_vocabulary_is_rebuilt_from_its_ids(ids):
    vocabulary = UserVocabulary(ids)
    assert UserVocabulary(list(vocabulary.ids)) == vocabulary


@given(IDS, st.text(min_size=1))
def test_one_user_more_is_the_vocabulary_of_all(ids, new):
    vocabulary = UserVocabulary(ids)
    if new in ids:
        with pytest.raises(ConfigurationError, match="already"):
            vocabulary.plus(new)
    else:
        more = vocabulary.plus(new)
        assert more == UserVocabulary([*ids, new])
        assert more.rows([*ids, new]).tolist() == list(range(1, len(ids) + 2))
        assert new not in vocabulary


@given(IDS, IDS)
def test_the_digest_tells_vocabularies_apart(a, b):
    assert (UserVocabulary(a).digest() == UserVocabulary(b).digest()) == (a == b)


def test_the_digest_sees_where_an_id_ends():
    assert UserVocabulary(["a", "bc"]).digest() != UserVocabulary(["ab", "c"]).digest()


def test_a_user_listed_twice_is_refused():
    with pytest.raises(ConfigurationError, match="'bob' is twice"):
        UserVocabulary(["bob", "ann", "bob"])


def test_a_million_users_are_looked_up_quickly():
    ids = [f"user-{i}" for i in range(1_000_000)]
    start = time.perf_counter()
    assert UserVocabulary(ids).rows(ids)[-1] == 1_000_000
    assert time.perf_counter() - start < 5  # about 0.3 s on an idle core


def test_a_number_is_no_id():
    for ids in ([7], ["7", 7], [None]):
        with pytest.raises(ConfigurationError, match="ids are strings"):
            UserVocabulary(["7"]).rows(ids)
    with pytest.raises(ConfigurationError, match="7 is of type int; ids are strings: '7'"):
        UserVocabulary([7])
