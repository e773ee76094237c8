"""The low-rank model of ids, against a convex problem that is solved slowly, and where the answer is known."""

import numpy as np
import pytest
import torch

from prlhf_lightning.analysis.response_factors import Opinions, fit_factors, well_fitted
from prlhf_lightning.analysis.votes import Votes


def votes_of(like, draw, per_user=12):
    """Pairs of an item that a user likes over one that they do not: `like` is `[U, I]` bool."""
    rows = []
    for user, own in enumerate(like):
        liked, others = np.flatnonzero(own), np.flatnonzero(~own)
        if len(liked) and len(others):
            rows += [(user, draw.choice(liked), draw.choice(others)) for _ in range(per_user)]
    return Votes(*np.array(rows).T, *like.shape)


def crowd(camps, seed, users=60, items=24):
    """Votes to learn from and others, by people who like the same, or of two camps; a fifth of opinions is noise."""
    draw = np.random.default_rng(seed)
    side = draw.choice([-1, 1], users) if camps else np.ones(users)
    agree = side[:, None] * draw.choice([-1, 1], items) > 0
    return [votes_of(agree ^ (draw.random(agree.shape) < 0.2), draw) for _ in range(2)]


def accuracy(model, votes):
    return float((model.margins(votes).sign() + 1).mean() / 2)


def test_an_opinion_is_the_share_won_minus_the_share_lost():
    votes = Votes(np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1]), np.array([0, 1, 1, 2]), 2, 3)
    found = Opinions.of(votes)
    told = {(u, i): v for u, i, v in zip(found.users, found.items, found.values, strict=True)}
    assert told == {(0, 0): 0.0, (0, 1): -1.0, (0, 2): 1.0, (1, 1): 1.0, (1, 2): -1.0}


def test_the_fit_is_as_good_as_under_the_trace_norm():
    """Ridges on both factors are the trace norm of their product (Srebro et al. 2004), which has no local minimum."""
    draw = np.random.default_rng(0)
    votes = votes_of(draw.random((6, 5)) < 0.5, draw, per_user=8)
    opinions, ridge = Opinions.of(votes), 0.7
    where = torch.from_numpy(opinions.users), torch.from_numpy(opinions.items)

    def objective(offsets, scores, own):
        rest = torch.from_numpy(opinions.values) - (offsets[:, None] + scores + own)[where]
        shrunk = offsets.square().sum() + 2 * scores.square().sum()
        return rest.square().sum() + shrunk + 2 * ridge * torch.linalg.svdvals(own).sum()

    free = [torch.zeros(6), torch.zeros(5), 0.01 * torch.randn(6, 5)]
    free = [part.double().requires_grad_() for part in free]
    optimizer = torch.optim.Adam(free, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.zero_grad()
        loss = objective(*free)
        loss.backward()
        optimizer.step()
        schedule.step()
    found = fit_factors(votes, rank=5, ridge=ridge)
    own = found.model.tastes @ found.model.items.T
    reached = objective(torch.from_numpy(found.offsets), found.model.scores, own)
    assert own.abs().max() > 0.1
    assert reached.item() == pytest.approx(loss.item(), rel=5e-3)


@pytest.mark.parametrize(("camps", "least", "most"), [(True, 0.15, 0.5), (False, -0.02, 0.02)])
def test_tastes_help_where_people_differ_and_else_do_no_harm(camps, least, most):
    train, others = crowd(camps, seed=0)
    model = well_fitted(train, "items").model
    assert least < accuracy(model, others) - accuracy(model.truncated(0), others) < most


def test_new_people_are_placed_by_the_exact_posterior():
    """The same numbers as those of conditioning the joint normal distribution of opinions on the ones that are seen."""
    votes = crowd(True, seed=2)[0]
    known = np.arange(40)
    fitted = fit_factors(votes[votes.users < 40], 2, 3.0)
    new = votes[votes.users >= 40]
    found = fitted.of_new_users(new, known)
    opinions = Opinions.of(new)
    mine = opinions.users == 45
    design = np.column_stack([fitted.model.items.numpy(), np.ones(24)])[opinions.items[mine]]
    own = np.column_stack([fitted.model.tastes.numpy(), fitted.offsets])[known]
    prior = np.cov(own, rowvar=False) + 1e-6 * np.eye(3)
    seen = design @ prior @ design.T + fitted.noise * np.eye(mine.sum())
    rest = opinions.values[mine] - fitted.model.scores.numpy()[opinions.items[mine]] - design @ own.mean(0)
    expected = own.mean(0) + prior @ design.T @ np.linalg.solve(seen, rest)
    np.testing.assert_allclose(found.tastes[45].numpy(), expected[:2], rtol=1e-6)
    np.testing.assert_allclose(found.tastes[3].numpy(), own.mean(0)[:2])  # no votes
