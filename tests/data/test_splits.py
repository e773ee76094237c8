import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data.splits import split_train_validation, text_key


def divide(rows, validation=0.3, unseen=0.3, seed=0):
    """Split rows given as (user, prompt) numbers."""
    names = [f"user {user}" for user, _ in rows]
    ids = list(dict.fromkeys(names))
    users = np.array([ids.index(name) for name in names], dtype=np.int32)
    keys = np.array([text_key(f"prompt {prompt}") for _, prompt in rows], dtype=np.uint64).view(np.int64)
    return split_train_validation(users, ids, keys, validation, unseen, seed)


ROWS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**62)


@given(ROWS, SEEDS)
def test_every_row_is_in_exactly_one_part(rows, seed):
    parts = divide(rows, seed=seed)
    assert sorted([*parts.train, *parts.seen, *parts.unseen]) == list(range(len(rows)))


@given(ROWS, SEEDS)
def test_no_prompt_is_in_training_and_in_seen_validation(rows, seed):
    parts = divide(rows, seed=seed)
    assert not {rows[i][1] for i in parts.train} & {rows[i][1] for i in parts.seen}


@given(ROWS, SEEDS)
def test_seen_users_are_trained_and_unseen_ones_are_not(rows, seed):
    parts = divide(rows, seed=seed)
    trained = {rows[i][0] for i in parts.train}
    assert {rows[i][0] for i in parts.seen} <= trained
    assert not {rows[i][0] for i in parts.unseen} & trained


@given(ROWS, ROWS, SEEDS)
def test_appended_rows_move_no_row_out_of_training(rows, more, seed):
    assert set(divide(rows, seed=seed).train) <= set(divide(rows + more, seed=seed).train)


@given(ROWS)
def test_holding_out_nothing_trains_on_everything(rows):
    assert len(divide(rows, 0.0, 0.0).train) == len(rows)


def test_a_user_whose_prompts_are_all_held_out_is_unseen():
    rows = [(user, user) for user in range(100)]
    parts = divide(rows, unseen=0.0)
    assert not len(parts.seen)
    assert parts.orphans == len(parts.unseen) > 0


def test_the_parts_have_about_the_sizes_asked_for():
    rows = [(user, prompt) for user in range(100) for prompt in range(100)]
    parts = divide(rows, validation=0.2, unseen=0.1)
    assert len(parts.unseen) == pytest.approx(1000, rel=0.8)
    assert len(parts.seen) / (len(parts.seen) + len(parts.train)) == pytest.approx(0.2, abs=0.12)


def test_another_seed_gives_another_division():
    rows = [(user, prompt) for user in range(20) for prompt in range(20)]
    assert divide(rows, seed=1).train.tolist() != divide(rows, seed=2).train.tolist()
