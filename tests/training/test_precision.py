"""With half precision what is trained moves as in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES
from test_training import make, make_data, make_trainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim

SLOW = Optim(lr=1e-5, user_lr=1e-4, warmup_steps=0)  # steps far below the rounding of bfloat16


def train(model_path, votes, folder, precision, lora=LoRA(rank=2), dtype="auto", **options):  # noqa: B008
    """Train, and return the module, what each trained weight moved by, and the losses."""
    torch.manual_seed(0)
    module = make(model_path, lora=lora)
    module.policy, module.optim = CausalLMPolicy(model_path, lora=lora, dtype=dtype), SLOW
    start, losses, step = {}, [], module.training_step
    before, compute = module.on_train_start, module.objective

    def on_train_start():
        before()
        start.update({k: p.detach().float().clone() for k, p in module.named_parameters() if p.requires_grad})

    def objective(batch, **kwargs):
        found = compute(batch, **kwargs)
        losses.append(found[0].detach().mean())
        return found

    module.on_train_start, module.objective, module.training_step = on_train_start, objective, step
    trainer = make_trainer(folder, precision=precision, limit_val_batches=0, **options)
    trainer.fit(module, make_data(votes, model_path))
    masters = {id(p): state["master"] for p, state in trainer.optimizers[0].state.items() if "master" in state}
    ends = {k: masters.get(id(p), p.detach()).float() for k, p in module.named_parameters()}
    return module, {name: ends[name] - at for name, at in start.items()}, torch.stack(losses)


def flat(moved):
    return torch.cat([value.flatten() for value in moved.values()])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", "auto"), ("16-true", "auto"), ("32-true", "bfloat16"), ("bf16-mixed", "bfloat16")],
)
def test_adapters_and_users_are_in_float32_and_all_of_them_move(model_path, votes, tmp_path, precision, dtype):
    module, moved, losses = train(model_path, votes, tmp_path, precision, dtype=dtype)
    half = torch.float16 if precision == "16-true" else torch.bfloat16
    kept = {(param.requires_grad, param.dtype) for param in module.policy.parameters()}
    assert kept == {(True, torch.float32), (False, half)}
    assert {param.dtype for param in module.user_model.parameters()} == {torch.float32}
    still = [name for name, value in moved.items() if (value == 0).float().mean() > 0.3]  # the generic user's row
    assert not still
    _, exact, expected = train(model_path, votes, tmp_path, "32-true")
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.0)
    assert torch.cosine_similarity(flat(moved), flat(exact), dim=0) > 0.9


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "auto"), ("32-true", "bfloat16")])
def test_all_weights_move_by_their_masters(model_path, votes, tmp_path, precision, dtype):
    module, moved, losses = train(model_path, votes, tmp_path, precision, lora=None, dtype=dtype)
    assert {param.dtype for param in module.policy.parameters()} == {torch.bfloat16}
    _, exact, expected = train(model_path, votes, tmp_path, "32-true", lora=None)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.0)
    assert torch.cosine_similarity(flat(moved), flat(exact), dim=0) > 0.9


def test_a_model_that_comes_in_bfloat16_is_trained_in_full(votes, tmp_path, model_path):
    """As most models do: `dtype: auto` takes it as it is."""
    folder = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).save_pretrained(folder)
    CausalLMPolicy(model_path).tokenizer.save_pretrained(folder)
    module, moved, _ = train(str(folder), votes, tmp_path, "32-true", lora=None)
    assert {param.dtype for param in module.policy.parameters()} == {torch.bfloat16}
    moved = {name: value for name, value in moved.items() if "embed_tokens" not in name}  # words that do not occur
    assert (flat(moved) != 0).float().mean() > 0.95


def test_a_run_with_masters_goes_on_where_it_was(model_path, votes, tmp_path):
    def fit(checkpoint=None):
        torch.manual_seed(0)
        module = make(model_path, lora=None)
        module.optim = SLOW
        trainer = make_trainer(tmp_path, precision="bf16-true", limit_val_batches=0, max_epochs=2)
        trainer.fit(module, make_data(votes, model_path), ckpt_path=checkpoint)
        return module, trainer

    straight, whole = fit()
    half = make(model_path, lora=None)
    half.optim = SLOW
    torch.manual_seed(0)
    first = make_trainer(tmp_path, precision="bf16-true", limit_val_batches=0, max_epochs=2)
    first.fit_loop.epoch_loop.on_advance_end = _saving(first, tmp_path / "middle.ckpt")
    first.fit(half, make_data(votes, model_path))
    resumed, rest = fit(tmp_path / "middle.ckpt")
    assert rest.global_step == whole.global_step
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    states = [list(trainer.optimizers[0].state.values()) for trainer in (whole, rest)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def _saving(trainer, path):
    """Save after the third step, as a callback would."""
    advance_end = trainer.fit_loop.epoch_loop.on_advance_end

    def on_advance_end(*args):
        advance_end(*args)
        if trainer.global_step == 3:
            trainer.save_checkpoint(path)

    return on_advance_end


@pytest.mark.parametrize(("precision", "dtype"), [("16-true", "auto"), ("32-true", "float16"), ("16-mixed", "float16")])
def test_weights_of_float16_are_not_trained(model_path, votes, tmp_path, precision, dtype):
    with pytest.raises(ConfigurationError, match="Train in bfloat16"):
        train(model_path, votes, tmp_path, precision, lora=None, dtype=dtype)


def test_gradients_of_float16_that_are_not_scaled_are_warned_of(model_path, votes, tmp_path):
    with pytest.warns(UserWarning, match="small gradients vanish"):
        train(model_path, votes, tmp_path, "32-true", dtype="float16", max_steps=1)


def test_rotary_frequencies_are_not_rounded(model_path, votes, tmp_path):
    module, *_ = train(model_path, votes, tmp_path, "bf16-true", max_steps=1)
    exact = LlamaForCausalLM(ARCHITECTURES["llama"]).model.rotary_emb.inv_freq
    assert torch.equal(module.policy.lm.model.rotary_emb.inv_freq, exact)
