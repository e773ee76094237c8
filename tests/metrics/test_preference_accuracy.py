import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prlhf_lightning.metrics import PreferenceAccuracy, UserAccuracy, wilson_interval

NAMES = ["accuracy", "accuracy_user_mean", "accuracy_worst_decile", "margin"]


def filled(users, chosen, rejected, sizes=None):
    """A metric that has seen these pairs in batches of the given sizes."""
    metric = PreferenceAccuracy()
    columns = torch.tensor(users), torch.tensor(chosen), torch.tensor(rejected)
    for batch in zip(*[column.split(sizes or len(users)) for column in columns], strict=True):
        metric.update(*batch)
    return metric


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_values_worked_by_hand():
    # User 7: right, tie. User -1: wrong. User 40: right, right, right.
    metric = filled([7, 7, -1, 40, 40, 40], [1.0, 0.0, 0.0, 2.0, 2.0, 2.0], [0.0, 0.0, 3.0, 1.0, 1.0, 1.0])
    assert values(metric) == pytest.approx(
        {
            "accuracy": 4.5 / 6,
            "accuracy_user_mean": (0.75 + 0 + 1) / 3,
            "accuracy_worst_decile": 0.0,
            "margin": (1 + 0 - 3 + 3) / 6,
        }
    )


def test_worst_decile_is_the_mean_of_the_worst_tenth_of_users():
    # 25 users, of whom the worst two have one of two and none of two pairs right.
    users = np.repeat(np.arange(25), 2)
    chosen = np.ones(50, np.float32)
    chosen[[10, 30, 31]] = -1
    metric = filled(users.tolist(), chosen.tolist(), [0.0] * 50)
    assert values(metric)["accuracy_worst_decile"] == pytest.approx(0.25)


ROWS = st.lists(
    st.tuples(st.integers(-3, 3) | st.sampled_from([2**62, -(2**62)]), *[st.integers(-4, 4).map(float)] * 2),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 60))
def test_equals_brute_force_however_the_pairs_are_batched(rows, size):
    metric = filled(*map(list, zip(*rows, strict=True)), sizes=size)
    by_user = {}
    for user, chosen, rejected in rows:
        by_user.setdefault(user, []).append((float(chosen > rejected) + 0.5 * (chosen == rejected), chosen - rejected))
    accuracies = sorted(np.mean([score for score, _ in pairs]) for pairs in by_user.values())
    everything = np.array([pair for pairs in by_user.values() for pair in pairs])
    assert [values(metric)[name] for name in NAMES] == pytest.approx(
        [
            everything[:, 0].mean(),
            np.mean(accuracies),
            np.mean(accuracies[: max(1, len(accuracies) // 10)]),
            everything[:, 1].mean(),
        ],
        abs=1e-5,
    )
    table = metric.table()
    assert [row.user for row in table] == sorted(by_user)
    for row in table:
        scores, margins = np.array(by_user[row.user]).T
        assert (row.pairs, row.accuracy, row.margin) == pytest.approx(
            (len(scores), scores.mean(), margins.mean()), abs=1e-5
        )
        assert 0 <= row.low <= row.accuracy + 1e-9
        assert row.accuracy - 1e-9 <= row.high <= 1


def test_an_empty_metric_is_nan_without_a_warning():
    metric = PreferenceAccuracy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(math.isnan(value) for value in values(metric).values())
        assert metric.table() == []


def test_a_batch_without_pairs_changes_nothing():
    metric = filled([1, 2], [1.0, 0.0], [0.0, 1.0])
    before = values(metric)
    metric.update(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))
    assert values(metric) == before


def test_a_nan_reward_shows_rather_than_counting_as_wrong():
    assert math.isnan(values(filled([1, 1], [math.nan, 1.0], [0.0, 0.0]))["accuracy"])


def test_reset_forgets_all_pairs():
    metric = filled([1], [1.0], [0.0])
    metric.reset()
    metric.update(torch.tensor([2]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert [row.user for row in metric.table()] == [2]


def test_forward_returns_the_batch_and_accumulates():
    metric = filled([1], [1.0], [0.0])
    assert metric(torch.tensor([1]), torch.tensor([0.0]), torch.tensor([1.0]))["accuracy"] == 0
    assert values(metric)["accuracy"] == 0.5


def test_misaligned_columns_are_refused():
    with pytest.raises(ValueError, match=r"must all be \[B\]"):
        PreferenceAccuracy().update(torch.tensor([1]), torch.zeros(2), torch.zeros(2))


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, Table I, method 3 (score, without continuity correction): 81/263, 15/148, 0/20, 1/29.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def rank_worker(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    uneven, one_sided, empty = PreferenceAccuracy(), PreferenceAccuracy(), PreferenceAccuracy()
    if rank == 0:
        uneven.update(torch.tensor([1, 1, 2**60]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]))
        uneven.update(torch.tensor([-5]), torch.tensor([3.0]), torch.tensor([0.0]))
    else:
        uneven.update(torch.tensor([1]), torch.tensor([0.0]), torch.tensor([4.0]))
        one_sided.update(torch.tensor([2**60 + 1]), torch.tensor([1.0]), torch.tensor([0.0]))
    result = {
        "values": values(uneven),
        "table": [vars(row) for row in uneven.table()],
        "one_sided": [row.user for row in one_sided.table()],
        "empty": values(empty)["accuracy"],
    }
    uneven.update(torch.tensor([9]), torch.tensor([1.0]), torch.tensor([0.0]))  # goes on after being merged
    result["pairs_of_9"] = [row.pairs for row in uneven.table() if row.user == 9]
    torch.save(result, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_pairs_merge_exactly(tmp_path):
    torch.multiprocessing.spawn(rank_worker, args=(str(tmp_path),), nprocs=2)
    together = filled([1, 1, 2**60, -5, 1], [1.0, 1.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 0.0, 4.0])
    for result in (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)):
        assert result["values"] == pytest.approx(values(together))
        assert [UserAccuracy(**row) for row in result["table"]] == together.table()
        assert result["one_sided"] == [2**60 + 1]
        assert math.isnan(result["empty"])
        assert result["pairs_of_9"] == [2]
