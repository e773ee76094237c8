from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf_lightning.data.sampling import UserGroupedBatchSampler
from prlhf_lightning.errors import ConfigurationError

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=60)
BUDGETS = st.one_of(st.none(), st.integers(1, 200))
SIZES = st.integers(1, 5)
WORLDS = st.integers(1, 4)
EPOCHS = st.integers(0, 9)


def make(rows, batch_size=4, epoch=0, **settings):
    users, lengths = np.array(rows).T
    sampler = UserGroupedBatchSampler(users, batch_size, lengths=lengths, **settings)
    sampler.set_epoch(epoch)
    return sampler


def ranks(rows, world, **settings):
    return [list(make(rows, rank=rank, world_size=world, **settings)) for rank in range(world)]


def flat(lists):
    return [position for batch in lists for position in batch]


def padding(steps, lengths):
    """Return the share of the steps' tokens that is padding."""
    return 1 - sum(lengths[step].sum() for step in steps) / sum(len(step) * lengths[step].max() for step in steps)


@given(ROWS, SIZES, SIZES, BUDGETS, EPOCHS)
def test_every_pair_comes_once_an_epoch(rows, batch_size, per_user, budget, epoch):
    order = flat(make(rows, batch_size, epoch, pairs_per_user=per_user, max_tokens=budget))
    assert sorted(order) == list(range(len(rows)))


@given(ROWS, SIZES, st.floats(0, 1), BUDGETS, EPOCHS)
def test_balanced_users_keep_their_share_of_an_epoch_in_buckets(rows, size, balance, budget, epoch):
    users = np.array(rows)[:, 0]
    order = flat(make(rows, size, epoch, balance=balance, max_tokens=budget))
    assert len(order) == len(rows)
    ids, counts = np.unique(users, return_counts=True)
    shares = counts ** (1 - balance) / (counts ** (1 - balance)).sum() * len(rows)
    drawn = np.array([(users[order] == user).sum() for user in ids])
    assert (np.abs(drawn - shares) < 1 + 1e-6).all()


@given(ROWS, SIZES, SIZES, WORLDS, st.sampled_from([0.0, 0.5]), st.integers(1, 200), EPOCHS)
def test_a_batch_over_its_rows_or_budget_is_a_single_row(rows, batch_size, per_user, world, balance, budget, epoch):
    settings = {"batch_size": batch_size, "pairs_per_user": per_user, "balance": balance, "max_tokens": budget}
    for batch in flat(ranks(rows, world, epoch=epoch, **settings)):
        longest = max(rows[position][1] for position in batch)
        assert 1 <= len(batch) <= batch_size
        assert len(batch) * longest <= budget or len(batch) == 1


@given(ROWS, SIZES, SIZES, WORLDS, st.sampled_from([0.0, 1.0]), BUDGETS)
def test_every_rank_has_the_announced_number_of_batches(rows, batch_size, per_user, world, balance, budget):
    settings = {"batch_size": batch_size, "pairs_per_user": per_user, "balance": balance, "max_tokens": budget}
    announced = len(make(rows, world_size=world, **settings))
    for epoch in (0, 3, 7):
        assert [len(rank) for rank in ranks(rows, world, epoch=epoch, **settings)] == [announced] * world


@given(ROWS, SIZES, WORLDS, BUDGETS, EPOCHS)
def test_ranks_share_each_pair_once_and_only_fill_up_when_short(rows, size, world, budget, epoch):
    drawn = Counter(flat(flat(ranks(rows, world, batch_size=size, max_tokens=budget, epoch=epoch))))
    assert set(drawn) == set(range(len(rows)))
    assert drawn.total() - len(rows) < world


@given(ROWS, SIZES, BUDGETS, st.floats(0, 1), EPOCHS, st.data())
def test_an_epoch_entered_midway_continues_as_if_unbroken(rows, per_user, budget, balance, epoch, data):
    settings = {"epoch": epoch, "pairs_per_user": per_user, "balance": balance, "max_tokens": budget}
    whole = list(make(rows, **settings))
    start = data.draw(st.integers(0, len(whole)))
    sampler = make(rows, **settings)
    sampler.set_epoch(epoch, start)
    assert list(sampler) == whole[start:]


@given(ROWS, SIZES, st.sampled_from([2, 3, 4]))
def test_without_a_budget_the_process_count_changes_no_step(rows, batch_size, world):
    alone = make(rows, batch_size * world).steps(0)
    assert [step.tolist() for step in make(rows, batch_size, world_size=world).steps(0)] == [s.tolist() for s in alone]


def lognormal(size=4000):
    draw = np.random.default_rng(0)
    return np.exp(draw.normal(5, 0.6, size)).astype(np.int64), np.repeat(np.arange(size // 8), 8)


@pytest.mark.parametrize("batch_size", [4, 32])
@pytest.mark.parametrize("budget", [None, 2000])
def test_most_padding_is_saved_where_lengths_are_log_normal(batch_size, budget):
    lengths, users = lognormal()
    plain = UserGroupedBatchSampler(users, batch_size).steps(0)
    bucketed = UserGroupedBatchSampler(users, batch_size, lengths=lengths, max_tokens=budget).steps(0)
    assert padding(plain, lengths) > 0.4
    assert padding(bucketed, lengths) < 0.2 * padding(plain, lengths)


def test_a_budget_needs_hardly_more_batches_than_its_tokens_do():
    lengths, users = lognormal()
    sampler = UserGroupedBatchSampler(users, 64, lengths=lengths, max_tokens=2000)
    assert len(sampler) < 1.1 * lengths.sum() / 2000


def test_runs_of_a_user_stay_together():
    lengths, users = lognormal()
    sampler = UserGroupedBatchSampler(users, 8, pairs_per_user=4, lengths=lengths)
    runs = users[sampler.order(0)].reshape(-1, 4)
    assert (runs == runs[:, :1]).all()


def test_who_meets_whom_and_where_changes_every_epoch():
    lengths, users = lognormal()
    sampler = UserGroupedBatchSampler(users, 8, lengths=lengths)
    first, second = ({frozenset(step) for step in map(np.ndarray.tolist, sampler.steps(epoch))} for epoch in (0, 1))
    assert len(first & second) < 5
    means = np.array([lengths[step].mean() for step in sampler.steps(0)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15  # long batches do not follow long ones


def test_a_budget_without_lengths_is_refused():
    with pytest.raises(ConfigurationError, match=r"max_tokens is 5; it .* needs lengths"):
        UserGroupedBatchSampler(np.arange(3), 2, max_tokens=5)
