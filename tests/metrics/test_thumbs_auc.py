import math

import pytest
import torch

from prlhf_lightning.metrics import UnpairedAUC, unpaired_auc, user_aucs


def rows(*given):
    """Tensors of `(user, reward, up)` rows."""
    users, rewards, ups = zip(*given, strict=True)
    rewards, ups = torch.tensor(rewards), torch.tensor(ups)
    return torch.tensor(users), rewards.masked_fill(~ups, math.nan), rewards.masked_fill(ups, math.nan)


def test_it_is_the_share_of_a_users_pairs_that_are_ranked_right():
    table = user_aucs(*rows((1, 2.0, True), (1, 0.0, True), (1, 1.0, False), (2, 5.0, False), (2, 5.0, True)))
    assert [(row.user, row.ups, row.downs, row.auc, row.gap) for row in table] == [
        (1, 2, 1, 0.5, 0.0),
        (2, 1, 1, 0.5, 0.0),  # a tie
    ]


def test_it_agrees_with_counting_pairs():
    torch.manual_seed(0)
    users, rewards = torch.randint(0, 9, (300,)), torch.randint(0, 12, (300,)).float()
    ups = torch.rand(300) < 0.3
    wins, pairs, by_user = 0.0, 0, []
    for user in range(9):
        up, down = (rewards[(users == user) & kind] for kind in (ups, ~ups))
        scores = (up[:, None] > down).double() + 0.5 * (up[:, None] == down)
        wins, pairs = wins + scores.sum(), pairs + scores.numel()
        by_user.append(scores.mean().item())
    values = unpaired_auc(users, rewards.masked_fill(~ups, math.nan), rewards.masked_fill(ups, math.nan))
    assert values["auc"] == pytest.approx(wins / pairs)
    assert values["auc_user_mean"] == pytest.approx(sum(by_user) / 9)
    assert values["auc_worst_decile"] == pytest.approx(min(by_user))
    assert values["reward_gap"] == pytest.approx(rewards[ups].mean() - rewards[~ups].mean())


def test_a_user_who_likes_everything_tells_no_ranking():
    likes_all = [(3, 0.0, True), (3, 1.0, True)]
    given = [(1, 2.0, True), (1, 1.0, False)]
    assert unpaired_auc(*rows(*given, *likes_all))["auc"] == unpaired_auc(*rows(*given))["auc"] == 1.0
    assert math.isnan(unpaired_auc(*rows(*likes_all))["auc"])
    assert math.isnan(user_aucs(*rows(*likes_all))[0].auc)


def test_a_nan_reward_shows_rather_than_counting_as_wrong():
    users, chosen, rejected = rows((1, 2.0, True), (1, 1.0, False), (1, math.nan, False))
    assert math.isnan(unpaired_auc(users, chosen, rejected)["auc"])


def test_the_metric_spans_batches_and_is_nan_without_rows():
    metric = UnpairedAUC()
    assert math.isnan(metric.compute()["auc"])
    metric.update(*rows((1, 2.0, True)))
    metric.update(*rows((1, 1.0, False)))
    assert metric.compute()["auc"] == 1.0
    assert [(row.ups, row.downs) for row in metric.table()] == [(1, 1)]
