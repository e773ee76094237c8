"""Estimates of the KL divergence, summed over all tokens of a small vocabulary, against the exact divergence."""

import pytest
import torch

from prlhf_lightning import losses as L

VOCABULARY = 6


def log_distribution(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(0)


def exact(log_probs, reference):
    return (log_probs.exp() * (log_probs - reference)).sum()


def expected(estimates, sampler):
    """The mean of an estimate over tokens of the sampler."""
    return (sampler.exp() * estimates).sum()


@pytest.fixture(params=[True, False], ids=["on-policy", "off-policy"])
def distributions(request):
    """Logits of the policy (a leaf), and log-probs of the policy, of its sampler and of the reference."""
    logits = log_distribution(0).requires_grad_()
    policy = logits.log_softmax(0)
    return logits, policy, policy.detach() if request.param else log_distribution(1), log_distribution(2)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_gradient_is_exact_on_average(distributions, kind):
    logits, policy, sampler, reference = distributions
    estimates = L.kl_estimates(policy, reference, (policy - sampler).exp(), kind)
    (found,) = torch.autograd.grad(expected(estimates, sampler), logits, retain_graph=True)
    (truth,) = torch.autograd.grad(exact(policy, reference), logits)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_value_is_exact_on_average(distributions, kind):
    _, policy, sampler, reference = distributions
    estimates = L.kl_estimates(policy, reference, (policy - sampler).exp(), kind)
    torch.testing.assert_close(expected(estimates, sampler), exact(policy, reference))


def test_k2_has_the_value_of_half_the_mean_square(distributions):
    _, policy, sampler, reference = distributions
    estimates = L.kl_estimates(policy, reference, (policy - sampler).exp(), "k2")
    truth = (policy.exp() * (policy - reference) ** 2).sum() / 2
    torch.testing.assert_close(expected(estimates, sampler), truth)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_each_tokens_gradient_is_that_with_the_ratio_in_front(distributions, kind):
    _, policy, sampler, reference = distributions
    leaf = policy.detach().requires_grad_()
    ratio, gap = (leaf - sampler).exp(), leaf - reference
    in_front = {"k1": ratio * gap - ratio, "k2": ratio.detach() * gap**2 / 2, "k3": ratio * ((-gap).exp() - 1 + gap)}
    (truth,) = torch.autograd.grad(in_front[kind].sum(), leaf)
    (found,) = torch.autograd.grad(L.kl_estimates(leaf, reference, (leaf - sampler).exp(), kind).sum(), leaf)
    torch.testing.assert_close(found, truth)


def test_one_token_that_became_likely_has_a_bounded_gradient():
    policy = torch.tensor([-0.1, -1.0], requires_grad=True)
    ratio = torch.tensor([1e8, 1.0])
    (gradient,) = torch.autograd.grad(L.kl_estimates(policy, torch.tensor([-2.0, -2.0]), ratio).sum(), policy)
    assert gradient.tolist() == pytest.approx([10 * 1.9, 1.0])
