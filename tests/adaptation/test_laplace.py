from __future__ import annotations

import torch
from torch.func import hessian
from torch.nn import functional as F

from prlhf_lightning.adaptation import UserPrior, information_gain, laplace


def toy(users: int = 3, pairs: int = 6, dims: int = 2):
    draw = torch.Generator().manual_seed(1)
    offsets = torch.randn(users, pairs, dtype=torch.float64, generator=draw)
    slopes = 2 * torch.randn(users, pairs, dims, dtype=torch.float64, generator=draw)
    mask = torch.arange(pairs) < torch.tensor([[pairs], [3], [0]])
    return offsets, slopes, mask


def test_mode_and_covariance_equal_brute_force_in_float64():
    offsets, slopes, mask = toy()
    found = laplace(offsets, slopes, mask)
    for user in range(3):
        own, slope = offsets[user][mask[user]], slopes[user][mask[user]]

        def objective(code, own=own, slope=slope):
            return -F.logsigmoid(own + slope @ code).sum() + code.square().sum() / 2

        code = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(2000):  # plain gradient descent: slow, and nothing in common with what is tested
            (gradient,) = torch.autograd.grad(objective(code), code)
            code = (code - 0.05 * gradient).detach().requires_grad_()
        torch.testing.assert_close(found.mode[user], code.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.covariance[user], hessian(objective)(code.detach()).inverse())


def test_without_pairs_the_posterior_is_the_prior():
    found = laplace(*toy())
    assert torch.equal(found.mode[2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.std[2], torch.ones(2, dtype=torch.float64))


def test_more_pairs_leave_less_uncertainty_on_average():
    draw = torch.Generator().manual_seed(2)
    offsets, slopes = torch.randn(200, 8, generator=draw), torch.randn(200, 8, 2, generator=draw)
    masks = [(torch.arange(8) < n).expand(200, -1) for n in range(9)]
    stds = [float(laplace(offsets, slopes, mask).std.mean()) for mask in masks]
    assert stds == sorted(stds, reverse=True)
    assert stds[8] < 0.8 * stds[0]


def test_users_of_opposite_tastes_become_kinds_of_their_own():
    draw = torch.Generator().manual_seed(0)
    taste = torch.tensor([1.0] * 6 + [-1.0] * 3)
    rows = taste[:, None] + 0.1 * torch.randn(9, 5, generator=draw)
    judgments = (taste[:, None] * torch.ones(9, 7)).sigmoid()
    prior = UserPrior.fit(rows, torch.zeros(5), judgments, kinds=2)
    torch.testing.assert_close(prior.weights, torch.tensor([0.1, 0.6, 0.3]))
    assert prior.rows(prior.centers)[1:].mean(1).sign().tolist() == [1.0, -1.0]
    assert torch.equal(prior.rows(prior.centers)[0], torch.zeros(5))


def test_a_question_on_which_the_kinds_differ_tells_most():
    margins = torch.tensor([[5.0, -5.0], [5.0, 5.0], [0.0, 0.0], [5.0, 0.0]])
    told = information_gain(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), margins)
    assert told[0].argmax() == 0
    assert told[0, 0] > 0.9
    torch.testing.assert_close(told[0, 1:3], torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(told[1], torch.zeros(4), atol=1e-6, rtol=0)  # who is known has nothing to tell
