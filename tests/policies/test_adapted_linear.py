from __future__ import annotations

import pytest
import torch
from peft.tuners import lora
from torch import nn
from transformers import AutoModelForCausalLM

from prlhf_lightning.policies import LoRA
from prlhf_lightning.policies.lora import AdaptedLinear, _Product, add_adapters


def adapted(path: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), LoRA(rank=4, dropout=dropout))
    for name, param in model.named_parameters():
        if "lora_B" in name:  # adapters that do something
            nn.init.normal_(param, std=0.2)
    return model


def results(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    width = model.get_base_model().config.hidden_size
    vectors = torch.randn(3, 7, width).to(dtype).requires_grad_()
    model.zero_grad()
    logits = model(inputs_embeds=vectors).logits
    (logits.float() * torch.randn(logits.shape)).sum().backward()
    return [logits, vectors.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def by_peft(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is AdaptedLinear:
            module.__class__ = lora.Linear
    return model


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_and_its_gradients_equal_the_formula(has_bias):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 5), (4, 5), (2, 5), (4, 2)))
    bias = torch.randn(4, dtype=torch.float64) if has_bias else None
    trained = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    y = _Product.apply(x, weight, bias, a, b, 0.7)
    expected = x @ (weight + 0.7 * b @ a).T + (0 if bias is None else bias)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, trained, upstream), torch.autograd.grad(expected, trained, upstream)
    )


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "neox"])
def test_a_model_gives_the_logits_and_gradients_of_peft(model_paths, name):
    model = adapted(model_paths[name], torch.float64)
    # GPT-2 keeps its weights transposed, in layers of its own.
    assert any(type(module) is AdaptedLinear for module in model.modules()) == (name != "gpt2")
    own = results(model, torch.float64)
    torch.testing.assert_close(own, results(by_peft(model), torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_it_is_as_near_to_float32_as_peft_is(model_path, autocast):
    exact = results(adapted(model_path), torch.float32)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = results(adapted(model_path, dtype), dtype)
        theirs = results(by_peft(adapted(model_path, dtype)), dtype)
    for truth, ours, pefts in zip(exact, own, theirs, strict=True):
        error, allowed = ((each.float() - truth).norm() for each in (ours, pefts))
        assert ours.dtype == pefts.dtype
        assert error <= 1.5 * allowed


def test_what_is_not_plain_is_left_to_peft(model_path, monkeypatch):
    model = adapted(model_path, dropout=0.5)
    calls = []
    by_peft_forward = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x: calls.append(self) or by_peft_forward(self, x))
    layers = sum(type(module) is AdaptedLinear for module in model.modules())
    ids = torch.tensor([[1, 2, 3]])
    model.train()(ids)
    assert len(calls) == layers  # dropout
    model.eval()(ids)
    assert len(calls) == layers
    with model.disable_adapter():
        model(ids)
    assert len(calls) == 2 * layers


def test_what_it_returns_may_be_changed_in_place(model_path):
    layer = next(module for module in adapted(model_path).modules() if type(module) is AdaptedLinear)
    x = torch.randn(2, 3, layer.in_features)
    layer(x).add_(1).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
