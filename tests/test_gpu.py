"""What a GPU computes, against the CPU: log-probs, training steps, writing, checkpoints.

Every test runs on the CPU too, so that it is known to work before there is a GPU.
"""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
import torch
from quiet_trainer import quiet_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.types import SoftPrompt, Tokens
from prlhf_lightning.user_models import IndividualUserModel

REAL = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
#: Largest difference of a token's log-prob from float64, of log-probs down to about -20. In bfloat16 a logit of that
#: size is rounded by up to 1/16.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
WIDTHS = [3, 64, 150]  # tokens of the longest prompt: in one tile of attention, at its edge, over several


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=REAL)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def llama(model_path, tmp_path_factory) -> str:
    """A model whose heads are wide enough for every kernel, with grouped queries and the tokenizer of the others."""
    config = LlamaConfig(
        vocab_size=25, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for weight in lm.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    path = tmp_path_factory.mktemp("llama")
    lm.save_pretrained(path)
    CausalLMPolicy(model_path).tokenizer.save_pretrained(path)
    return str(path)


def build(path: str, device: str, dtype: str, **how) -> CausalLMPolicy:
    policy = CausalLMPolicy(path, lora=LoRA(rank=2), dtype=dtype, **how)
    policy.build()
    return policy.to(device).train()


def ragged(width: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return three prompts, the longest of `width` tokens, and two completions of each."""
    draw = random.Random(width)
    texts = [[draw.choices(range(4, 25), k=max(1, length)) for length in (7, 2, 4)] for _ in range(2)]
    return [[1, *draw.choices(range(4, 25), k=length - 1)] for length in (width, 2, width // 2 + 1)], texts


@cache
def in_float64(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def float64_log_probs(path: str, prompt: list[int], completion: list[int], vectors: torch.Tensor) -> torch.Tensor:
    """Score one row alone, by the model's own forward on the CPU."""
    lm = in_float64(path)
    embed = lm.get_input_embeddings()
    parts = [embed(torch.tensor(prompt[:1])), vectors.double(), embed(torch.tensor(prompt[1:] + completion))]
    logits = lm(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    return logits[-len(completion) - 1 : -1].log_softmax(-1)[range(len(completion)), completion].detach()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}], ids=["cache", "rows"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_log_probs_are_those_of_float64(llama, device, dtype, how, width):
    policy = build(llama, device, dtype, **how)
    prompts, texts = ragged(width)
    vectors = 0.3 * torch.randn(3, 2, 128)
    prompt, completions = Tokens.from_lists(prompts).to(device), [Tokens.from_lists(part).to(device) for part in texts]
    scored = policy.log_probs(prompt, completions, SoftPrompt.full(vectors.to(device)))
    for part, rows in zip(scored, texts, strict=True):
        for row, (tokens, mask) in enumerate(zip(part.tokens.cpu(), part.mask.cpu(), strict=True)):
            expected = float64_log_probs(llama, prompts[row], rows[row], vectors[row])
            torch.testing.assert_close(tokens[mask].double(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_padded_rows_are_those_of_the_cpu(llama, device, dtype, width):
    prompts, texts = ragged(width)
    found = []
    for where, precision in ((device, dtype), ("cpu", "float32")):
        policy = build(llama, where, precision)
        torch.manual_seed(0)
        vectors = (0.3 * torch.randn(3, 2, 128)).to(where).requires_grad_()
        completions = [Tokens.from_lists(part).to(where) for part in texts]
        scored = policy.log_probs(Tokens.from_lists(prompts).to(where), completions, SoftPrompt.full(vectors))
        torch.nn.functional.softplus(0.1 * (scored[1].sum - scored[0].sum)).sum().backward()
        found.append(vectors.grad.float().cpu())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < (1e-3 if dtype == "float32" else 0.2)  # false for NaN


def test_gradients_at_the_width_where_cudnn_fails_are_finite(llama, device):
    build(llama, device, "bfloat16")  # which excludes cuDNN
    length, width = 704, 64
    query, key, value = (0.1 * torch.randn(1, 1, length, width, device=device, dtype=torch.bfloat16) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(width)
    query.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert query.grad.isfinite().all()


def fit(path: str, votes, folder, device: str, **limits) -> PersonalizedLM:
    policy = CausalLMPolicy(path, lora=LoRA(rank=2), dtype="bfloat16")
    optim = Optim(lr=1e-2, user_lr=1e-1, user_weight_decay=0.1, warmup_steps=0, schedule="constant")
    module = PersonalizedLM(IndividualUserModel(2), policy, DPOLoss(), optim=optim)
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=path, batch_size=2, validation_fraction=0.0)
    where = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1}
    trainer = quiet_trainer(folder, max_epochs=1, gradient_clip_val=1.0, limit_val_batches=0, **where, **limits)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def test_a_step_changes_the_users_of_its_batch_alone(llama, votes, tmp_path, device, monkeypatch):
    users, step = [], PersonalizedLM.training_step
    monkeypatch.setattr(
        PersonalizedLM, "training_step", lambda self, b, i: users.extend(b.user_ids) or step(self, b, i)
    )
    module = fit(llama, votes, tmp_path, device, limit_train_batches=1)
    rows = module.user_model.offsets.weight.detach().cpu()
    changed = {user for user in module.vocabulary.ids if rows[int(module.vocabulary.rows([user])[0])].any()}
    assert changed == set(users)
    assert len(changed) < 4


def test_texts_of_a_mixed_batch_are_those_written_alone(llama, votes, tmp_path, device):
    module = fit(llama, votes, tmp_path, device, limit_train_batches=8).eval().to(device)
    writer = Generator(module.policy.lm.float(), module.policy.tokenizer, module.user_model, module.vocabulary)
    asked = [
        GenerationRequest(prompt, user, strength=strength, max_new_tokens=6, temperature=0.0)
        for prompt in ("the cat", "a dog ran fast and slow " * 4)
        for user in ("ann", "bob", None)
        for strength in ((1.0, 2.0) if user else (1.0,))
    ]
    together = [text.text for text in writer.generate(asked, max_batch_rows=5)]
    assert together == [writer.generate([one])[0].text for one in asked]
    assert len(set(together)) > 1


def test_a_checkpoint_saved_on_a_gpu_loads_on_the_cpu(llama, votes, tmp_path, device):
    module = fit(llama, votes, tmp_path, device, limit_train_batches=2)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    loaded = PersonalizedLM.load_from_checkpoint(
        tmp_path / "last.ckpt",
        map_location="cpu",
        user_model=IndividualUserModel(2),
        policy=CausalLMPolicy(llama, lora=LoRA(rank=2), dtype="bfloat16"),
        loss=DPOLoss(),
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    state, trained = loaded.state_dict(), module.state_dict()
    assert kept.keys() <= state.keys()
    assert all(torch.equal(state[name], trained[name].cpu()) for name in kept)
