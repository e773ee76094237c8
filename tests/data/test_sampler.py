from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data.sampling import SequentialBatchSampler, UserGroupedBatchSampler
from prlhf_lightning.errors import ConfigurationError

USERS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)
SIZES = st.integers(1, 5)
WORLDS = st.integers(1, 4)


def batches(users, batch_size=4, epoch=0, start=0, **settings):
    sampler = UserGroupedBatchSampler(users, batch_size, **settings)
    sampler.set_epoch(epoch, start)
    result = list(sampler)
    assert len(result) == len(sampler) - start
    return result


def flat(lists):
    return [position for batch in lists for position in batch]


@given(USERS, SIZES, SIZES, st.integers(0, 9))
def test_unbalanced_every_pair_comes_once_an_epoch(users, batch_size, per_user, epoch):
    order = flat(batches(users, batch_size, epoch, pairs_per_user=per_user))
    assert sorted(order) == list(range(len(users)))


@given(USERS, st.floats(0, 1), SIZES, st.integers(0, 9))
def test_balanced_epochs_keep_their_length_with_few_copies(users, balance, per_user, epoch):
    order = flat(batches(users, epoch=epoch, balance=balance, pairs_per_user=per_user))
    assert len(order) == len(users)
    times = Counter(order)
    for user in set(users):  # a user's pairs come round in turn
        counts = [times[position] for position in np.flatnonzero(users == user)]
        assert max(counts) - min(counts) <= 1


@given(USERS, st.floats(0, 1), st.integers(0, 9))
def test_a_users_share_is_rounded_to_a_neighbouring_integer(users, balance, epoch):
    order = flat(batches(users, epoch=epoch, balance=balance))
    ids, counts = np.unique(users, return_counts=True)
    shares = counts ** (1 - balance)
    shares = shares / shares.sum() * len(users)
    drawn = np.array([(users[order] == user).sum() for user in ids])
    assert (np.abs(drawn - shares) < 1 + 1e-6).all()


def test_fully_balanced_shares_are_right_on_average():
    users = np.repeat([0, 1, 2], [1, 2, 8])
    sampler = UserGroupedBatchSampler(users, 4, balance=1.0)
    drawn = np.concatenate([users[sampler.order(epoch)] for epoch in range(600)])
    assert np.bincount(drawn) / 600 == pytest.approx([11 / 3] * 3, abs=0.1)


def test_a_prolific_users_pairs_all_come_up_over_the_epochs():
    users = np.repeat([0, 1], [50, 2])
    sampler = UserGroupedBatchSampler(users, 4, balance=1.0)
    assert {position for epoch in range(12) for position in sampler.order(epoch)} == set(range(52))


@given(USERS, SIZES, st.floats(0, 1))
def test_runs_of_one_user_are_full_where_the_pairs_allow(users, per_user, balance):
    users = np.sort(users)
    order = UserGroupedBatchSampler(users, 4, per_user, balance).order(0)
    # The longest stretch without a repeated pair that one user could have is at least a run.
    for user, count in zip(*np.unique(users, return_counts=True), strict=True):
        places = np.flatnonzero(users[order] == user)
        stretches = 1 + np.sum(np.diff(places) > 1)
        passes = -(-len(places) // count)
        assert stretches <= -(-len(places) // per_user) + passes


def test_pairs_of_a_user_stand_together_and_users_are_mixed():
    users = np.repeat(np.arange(50), 4)
    order = UserGroupedBatchSampler(users, 8, pairs_per_user=4).order(0).reshape(-1, 4)
    assert (users[order] == users[order][:, :1]).all()
    assert users[order][:, 0].tolist() != sorted(users[order][:, 0])


def test_a_run_never_holds_the_same_pair_twice():
    users = np.repeat([0, 1], [3, 61])
    order = UserGroupedBatchSampler(users, 8, pairs_per_user=4, balance=1.0).order(0)
    starts = np.flatnonzero(np.diff(users[order], prepend=-1))
    short = [run for run in np.split(order, starts[1:]) if users[run[0]] == 0]
    assert sum(len(run) for run in short) == 32
    assert all(run.size % 3 == 0 or run.size < 3 for run in short)  # whole passes over the three pairs


@given(USERS, SIZES, WORLDS, st.floats(0, 1), st.integers(0, 3))
def test_all_ranks_have_equally_many_batches_and_miss_no_pair(users, batch_size, world, balance, epoch):
    settings = {"epoch": epoch, "balance": balance, "pairs_per_user": 2}
    ranks = [batches(users, batch_size, **settings, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(batch for rank in ranks for batch in rank)
    extra = Counter(flat(flat(ranks))) - Counter(flat(batches(users, batch_size, **settings)))
    assert extra.total() < world
    assert not Counter(flat(batches(users, batch_size, **settings))) - Counter(flat(flat(ranks)))


@given(USERS, SIZES, st.sampled_from([2, 3, 4]))
def test_the_process_count_does_not_change_the_global_batch(users, batch_size, world):
    alone = batches(users, batch_size * world)
    ranks = [batches(users, batch_size, rank=rank, world_size=world) for rank in range(world)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert flat(parts)[: len(whole)] == whole


@given(USERS, st.integers(0, 9), st.floats(0, 1), st.data())
def test_an_epoch_entered_midway_continues_as_if_unbroken(users, epoch, balance, data):
    whole = batches(users, epoch=epoch, balance=balance)
    start = data.draw(st.integers(0, len(whole)))
    assert batches(users, epoch=epoch, balance=balance, start=start) == whole[start:]


def test_every_epoch_and_seed_has_an_order_of_its_own():
    users = np.arange(30)
    orders = [batches(users, epoch=epoch, seed=seed) for epoch in range(3) for seed in range(3)]
    assert len({str(order) for order in orders}) == 9
    assert batches(users, epoch=1, seed=1) == batches(users, epoch=1, seed=1)


@pytest.mark.parametrize("settings", [{"balance": 1.5}, {"pairs_per_user": 0}, {"batch_size": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        batches(np.arange(3), **settings)


@given(st.integers(0, 60), SIZES, WORLDS)
def test_evaluation_takes_every_row_once_in_order(size, batch_size, world):
    ranks = [list(SequentialBatchSampler(size, batch_size, rank, world)) for rank in range(world)]
    assert sorted(flat(flat(ranks))) == list(range(size))
    for rank in ranks:
        assert flat(rank) == sorted(flat(rank))
        assert all((len(batch) > 0 or size < world) and len(batch) <= max(batch_size, 2) for batch in rank)


@given(st.integers(0, 60), SIZES, WORLDS)
def test_evaluation_has_equally_many_batches_on_every_rank(size, batch_size, world):
    assert len({len(SequentialBatchSampler(size, batch_size, rank, world)) for rank in range(world)}) == 1


@given(USERS, SIZES, WORLDS, st.integers(0, 3), st.integers(1, 4))
def test_the_pairs_of_steps_over_all_ranks_are_known_in_advance(users, batch_size, world_size, epoch, window):
    """So that every pair of accumulated batches can weigh the same, whichever rank it is on."""
    by_rank = [batches(users, batch_size, epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    sampler = UserGroupedBatchSampler(users, batch_size, world_size=world_size)
    for first in range(0, len(sampler), window):
        together = sum(len(batch) for rank in by_rank for batch in rank[first : first + window])
        mean = sampler.pairs_per_rank(epoch, slice(first, first + window))
        assert mean == pytest.approx(together / world_size)


@pytest.mark.parametrize(
    "settings", [{}, {"balance": 1.0}, {"pairs_per_user": 3}, {"lengths": np.arange(60) % 9 + 4, "max_tokens": 60}]
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_are_left_out_of_an_epoch_as_often_as_named(settings, world_size):
    users = np.arange(60) % 7
    done = UserGroupedBatchSampler(users, 4, seed=1, **settings).steps(2)[:5]
    whole = UserGroupedBatchSampler(users, 5, seed=1, world_size=world_size, **settings)
    sampler = UserGroupedBatchSampler(users, 5, seed=1, world_size=world_size, **settings)
    sampler.leave_out(2, np.concatenate(done))
    expected = Counter(whole.order(2).tolist()) - Counter(np.concatenate(done).tolist())
    assert Counter(sampler.order(2).tolist()) == expected
    first = sampler.first(2)
    assert len(sampler.steps(2)) == len(whole.steps(2))
    assert all(len(step) for step in sampler.steps(2)[first:])
    assert sampler.pairs_per_rank(2, slice(0, first)) == 0
    assert sampler.order(3).tolist() == whole.order(3).tolist()
