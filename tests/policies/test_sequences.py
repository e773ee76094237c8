from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prlhf_lightning.policies import sequences
from prlhf_lightning.policies.sequences import join, token_log_probs
from prlhf_lightning.types import SoftPrompt


def plain(hidden, targets, head):
    return head(hidden).float().log_softmax(-1)[torch.arange(len(targets)), targets]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    vocab=st.integers(2, 30),
    rows=st.integers(1, 9),
    bias=st.booleans(),
    frozen=st.booleans(),
)
def test_any_chunks_equal_the_scores_of_a_full_log_softmax(n, vocab, rows, bias, frozen):
    head = nn.Linear(6, vocab, bias=bias).requires_grad_(not frozen)
    targets, weights = torch.randint(vocab, (n,)), torch.randn(n)
    results = []
    before, sequences._LOGITS_PER_CHUNK = sequences._LOGITS_PER_CHUNK, rows * vocab
    try:
        for score in (lambda h: plain(h, targets, head), lambda h: token_log_probs(h, targets, head, vocab)):
            head.zero_grad()
            hidden = torch.linspace(-2, 2, n * 6).view(n, 6).requires_grad_()
            scores = score(hidden)
            (scores * weights).sum().backward()
            results.append([scores.detach(), hidden.grad, *(p.grad for p in head.parameters() if not frozen)])
    finally:
        sequences._LOGITS_PER_CHUNK = before
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_frozen_head_multiplies_in_bfloat16(weight_dtype):
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(5, 16, requires_grad=True), torch.randint(50, (5,))
    exact = plain(hidden, targets, head)
    exact_grad = torch.autograd.grad(exact.sum(), hidden)[0]
    head.to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores = token_log_probs(hidden, targets, head, 50)
    (grad,) = torch.autograd.grad(scores.sum(), hidden)
    assert scores.dtype == torch.float32
    assert grad.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad, exact_grad, rtol=5e-2, atol=2e-2)


def test_no_gradient_is_prepared_where_none_is_wanted():
    head = nn.Linear(6, 10).requires_grad_(False)
    assert not token_log_probs(torch.randn(3, 6), torch.tensor([1, 2, 3]), head, 10).requires_grad


def test_rows_are_joined_without_gaps_on_either_side():
    first = SoftPrompt(torch.tensor([[[1.0], [9.0]], [[1.0], [2.0]]]), torch.tensor([[True, False], [True, True]]))
    second = SoftPrompt(torch.tensor([[[3.0]], [[9.0]]]), torch.tensor([[True], [False]]))
    left, right = join([first, second]), join([first, second], align="right")
    assert left.vectors[..., 0].tolist() == [[1, 3], [1, 2]]
    assert right.vectors[..., 0].tolist() == [[1, 3], [1, 2]]
    wide = join([first, second, second])
    assert wide.mask.tolist() == [[True, True, True], [True, True, False]]
    assert join([first, second, second], align="right").mask.tolist() == [[True, True, True], [False, True, True]]
