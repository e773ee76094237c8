from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.optim import Optim, RowwiseAdamW, clip_gradients

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.05}


def table(rows: int = 4) -> nn.Embedding:
    return nn.Embedding(rows, 3, sparse=True)


def descend(model: nn.Embedding, optimizer: torch.optim.Optimizer, rows: list[int]) -> None:
    optimizer.zero_grad()
    model(torch.tensor(rows)).pow(3).sum().backward()
    optimizer.step()


def test_a_table_whose_rows_are_all_present_moves_as_in_adamw():
    sparse = table()
    dense = nn.Embedding.from_pretrained(sparse.weight.detach().clone(), freeze=False)
    ours, torchs = RowwiseAdamW(sparse.parameters(), **SETTINGS), torch.optim.AdamW(dense.parameters(), **SETTINGS)
    for _ in range(5):
        descend(sparse, ours, [0, 1, 2, 3, 3])
        descend(dense, torchs, [0, 1, 2, 3, 3])
        torch.testing.assert_close(sparse.weight, dense.weight)


def test_an_absent_user_does_not_move_and_counts_no_step():
    model, alone = table(), table()
    alone.weight.data = model.weight.data.clone()
    optimizer, lonely = RowwiseAdamW(model.parameters(), **SETTINGS), RowwiseAdamW(alone.parameters(), **SETTINGS)
    start = model.weight.detach().clone()
    for rows in ([1], [2], [1, 2], [2]):
        descend(model, optimizer, rows)
    assert torch.equal(model.weight[[0, 3]], start[[0, 3]])
    before = model.weight.detach().clone()
    descend(model, optimizer, [2])
    assert torch.equal(model.weight[1], before[1])
    for rows in ([1], [1]):
        descend(alone, lonely, rows)
    torch.testing.assert_close(model.weight[1], alone.weight[1])


def test_dense_parameters_move_as_under_torch_adamw():
    model, twin = nn.Linear(3, 2), None
    twin = copy.deepcopy(model)
    ours, torchs = RowwiseAdamW(model.parameters(), **SETTINGS), torch.optim.AdamW(twin.parameters(), **SETTINGS)
    for _ in range(3):
        for module, optimizer in ((model, ours), (twin, torchs)):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight, twin.weight)


def test_a_restored_optimizer_goes_on_bit_for_bit():
    model = table()
    optimizer = RowwiseAdamW(model.parameters(), **SETTINGS)
    descend(model, optimizer, [1, 2])
    other = table()
    other.load_state_dict(model.state_dict())
    restored = RowwiseAdamW(other.parameters(), **SETTINGS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(model, optimizer, [2, 3])
    descend(other, restored, [2, 3])
    assert torch.equal(model.weight, other.weight)


def test_clipping_counts_sparse_and_dense_gradients_together():
    sparse, linear = table(), nn.Linear(3, 1)
    dense = nn.Embedding.from_pretrained(sparse.weight.detach().clone(), freeze=False)
    norms = []
    for model in (sparse, dense):
        linear.zero_grad()
        linear(model(torch.tensor([1, 1, 2]))).square().sum().backward()
        params = [*model.parameters(), *linear.parameters()]
        norms.append(clip_gradients(params, 0.1) if model is sparse else nn.utils.clip_grad_norm_(params, 0.1))
        if model is sparse:
            clipped = linear.weight.grad.clone()
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    torch.testing.assert_close(clipped, linear.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_moves_as_in_float32(dtype):
    weight = nn.Parameter(torch.linspace(0.5, 2, 8).to(dtype))
    twin = nn.Parameter(weight.detach().float())
    how = {**SETTINGS, "lr": 1e-5}
    ours, torchs = RowwiseAdamW([weight], **how), torch.optim.AdamW([twin], **how)
    for step in range(400):
        weight.grad = torch.linspace(-1, 1, 8).mul(1 + step % 3).to(dtype)
        twin.grad = weight.grad.float()
        ours.step()
        torchs.step()
        if step == 200:  # it goes on from its state
            state = copy.deepcopy(ours.state_dict())
            ours = RowwiseAdamW([weight], **how)
            ours.load_state_dict(state)
    assert torch.equal(ours.state[weight]["master"], twin)
    assert torch.equal(weight, twin.to(dtype))
    assert weight.grad is not None


def test_a_restored_count_of_steps_goes_on_in_a_bfloat16_table():
    model = table().to(torch.bfloat16)
    optimizer = RowwiseAdamW(model.parameters(), **SETTINGS)
    descend(model, optimizer, [1, 2])
    optimizer.state[model.weight]["row_steps"] += 300  # bfloat16 has no 301
    restored = RowwiseAdamW(model.parameters(), **SETTINGS)
    restored.load_state_dict(optimizer.state_dict())
    descend(model, restored, [2])
    assert restored.state[model.weight]["row_steps"].tolist() == [300, 301, 302, 300]
    assert restored.state[model.weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.weight]["row_steps"].tolist() == [300, 301, 301, 300]  # not shared


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": 0.0}, "model.optim.lr is 0.0; it must be a number above 0"),
        ({"lr": math.nan}, "model.optim.lr is nan"),
        ({"user_lr": -1e-3}, "model.optim.user_lr is -0.001; it must be a number above 0"),
        ({"weight_decay": -0.1}, r"model.optim.weight_decay is -0.1; it must be 0 \(none\) or more"),
        ({"user_weight_decay": math.inf}, "model.optim.user_weight_decay is inf"),
        (
            {"betas": (0.9, 1.0)},
            r"model.optim.betas is \(0.9, 1.0\); it must be two numbers, each at least 0",
        ),
        ({"betas": (0.9,)}, "model.optim.betas"),
        ({"schedule": "cosin"}, "model.optim.schedule is 'cosin'; it must be one of cosine, linear, constant"),
        ({"warmup_steps": -1}, "model.optim.warmup_steps is -1; it must be a whole number of steps"),
        ({"warmup_steps": 1.5}, "model.optim.warmup_steps is 1.5"),
        ({"warmup_steps": math.nan}, "model.optim.warmup_steps is nan"),
        ({"warmup_steps": math.inf}, "model.optim.warmup_steps is inf"),
    ],
)
def test_settings_that_train_nothing_are_refused(given, says):
    with pytest.raises(ConfigurationError, match=says):
        Optim(**given)


@pytest.mark.parametrize(
    "given", [{"warmup_steps": 0}, {"warmup_steps": 0.5}, {"warmup_steps": 150}, {"betas": (0.0, 0.95)}]
)
def test_settings_at_the_edge_are_taken(given):
    Optim(**given)


@pytest.mark.parametrize(
    ("width", "lr"),
    [(4096, 8.6e-5), (2000, 1.5e-4), (576, 3.9e-4), (192, 9.2e-4), (8, 2e-3)],
)
def test_rates_that_are_left_open_go_by_the_width_of_the_policy(width, lr):
    adapters = Optim().for_width(width)
    assert adapters.lr == pytest.approx(lr, rel=0.01)
    assert adapters.user_lr == pytest.approx(20 * lr, rel=0.01)
    assert Optim().for_width(width, all_weights=True).lr == pytest.approx(lr / 10, rel=0.01)
    assert Optim().for_width(width, all_weights=True).user_lr == adapters.user_lr
    assert Optim().for_width(width, reads_pairs=True).user_lr == pytest.approx(2 * lr, rel=0.01)


def test_rates_that_are_given_stay_as_they_are():
    assert Optim(lr=1.0, user_lr=2.0).for_width(64, all_weights=True, reads_pairs=True) == Optim(lr=1.0, user_lr=2.0)
