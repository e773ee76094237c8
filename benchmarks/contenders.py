"""What the benchmarks compare: our training step, TRL's DPOTrainer, and the authors' scheme.

A step is forward, loss, backward, clipping and AdamW on a batch that is already tokenized; no trainer's loop or logging
is in it. All see the same model (random weights), the same LoRA and the same token ids. Without the package `trl`, its
contenders are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.policies.loading import avoid_cudnn_attention
from prlhf_lightning.training import PersonalizedLM, RowwiseAdamW
from prlhf_lightning.training.optim import clip_gradients
from prlhf_lightning.types import PreferenceBatch, Tokens
from prlhf_lightning.user_models import IndividualUserModel, UniformUserModel

MODELS = {
    "tiny": {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2},
    "20m": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "heads": 4},
    "125m": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": 12},
    "128k": {"vocab_size": 128256, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "heads": 8},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "heads": 32},
}
BETA, RANK = 0.1, 16
HAS_TRL = importlib.util.find_spec("trl") is not None
Step = Callable[[], float]


def save_model(name: str, folder: Path) -> Path:
    """Write a configuration and a tokenizer, so that everybody builds the same model."""
    sizes = dict(MODELS[name])
    heads = sizes.pop("heads")
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=name in ("20m", "125m", "128k"),
    )  # fmt: skip
    path = folder / name
    config.save_pretrained(path)
    byte_lm = Path(__file__).parent.parent / "prlhf_lightning/assets/byte-lm"
    AutoTokenizer.from_pretrained(byte_lm).save_pretrained(path)
    return path


@cache
def _weights(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """Draw weights where they are computed with, in their own dtype: at 8B, the host would need 32 GB and minutes."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(path), dtype=getattr(torch, dtype))


def make_lm(path: Path, args: argparse.Namespace, lora: bool) -> PreTrainedModel:
    """Return a model; with LoRA, all share their weights, which nothing trains."""
    lm = _weights(path, args.dtype, args.device)
    shared = {id(weight): weight for weight in lm.parameters()} if lora else {}
    return copy.deepcopy(lm, shared)


class RandomPolicy(CausalLMPolicy):
    """A policy with the weights that all contenders have."""

    def __init__(self, path: Path, args: argparse.Namespace, lora: bool, **how: bool) -> None:
        adapters = LoRA(rank=RANK, alpha=2 * RANK) if lora else None
        recompute = getattr(args, "checkpointing", False)
        what = {"random_init": 0, "dtype": args.dtype, "gradient_checkpointing": recompute}
        super().__init__(str(path), lora=adapters, **what, **how)
        self._args = args

    def _load_lm(self) -> PreTrainedModel:
        avoid_cudnn_attention()
        return make_lm(Path(self.path), self._args, self.lora is not None)


def make_batch(shape: tuple[int, int, int], pairs: int, device: str, ragged: bool = False) -> PreferenceBatch:
    """Draw pairs of exactly the shape's lengths; ragged, of lengths between a quarter of them and the whole."""
    generator = torch.Generator().manual_seed(0)

    def block(length: int) -> Tokens:
        ids = torch.randint(3, 30000, (pairs, length), generator=generator)
        lengths = torch.full((pairs,), length)
        if ragged:
            lengths = torch.randint(max(1, length // 4), length + 1, (pairs,), generator=generator)
            lengths[0] = length
        return Tokens(ids, torch.arange(length) < lengths[:, None])

    prompt, chosen, rejected = (block(length) for length in shape)
    prompt.ids[:, 0] = 1
    nothing = Tokens(prompt.ids[:, :0], prompt.mask[:, :0])
    users = tuple(f"user-{i}" for i in range(pairs))
    return PreferenceBatch(users, nothing, prompt, chosen, rejected, torch.arange(pairs)).to(device)


def ours(
    path: Path,
    batch: PreferenceBatch,
    args: argparse.Namespace,
    lora: bool,
    personal: bool,
    cached: bool,
    sampled: bool = False,
    compiled: bool = False,
    packed: bool = False,
) -> Step:
    """P-DPO with ten vectors a user, or plain DPO."""
    torch.manual_seed(0)
    policy = RandomPolicy(path, args, lora, torch_compile=compiled, packing=packed)
    user_model = IndividualUserModel(10) if personal else UniformUserModel(0)
    module = PersonalizedLM(user_model, policy, DPOLoss(BETA), alpha=0.5 if personal else 1.0)
    module.vocabulary = UserVocabulary(batch.user_ids)
    with torch.device(args.device):
        module.configure_model()
    module.to(args.device).train()
    if cached:
        batch = replace(batch, reference=module.reference_log_probs(batch))
    optimizer = RowwiseAdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        return descend(module.objective(batch, sampled=sampled)[0].mean(), optimizer)

    return step


def trls(path: Path, batch: PreferenceBatch, args: argparse.Namespace, lora: bool, cached: bool) -> Step:
    """TRL's DPOTrainer: its own model set-up and loss."""
    import trl

    torch.manual_seed(0)
    model = make_lm(path, args, lora)
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    trainer = trl.DPOTrainer(
        model,
        ref_model=None if lora else copy.deepcopy(model),
        args=trl.DPOConfig(
            output_dir=tempfile.mkdtemp(), beta=BETA, report_to=[], use_cpu=args.device == "cpu", bf16=False,
            activation_checkpointing=False, per_device_train_batch_size=1, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    model = trainer.model.to(args.device).train()
    if getattr(args, "checkpointing", False):  # which the trainer's own loop switches on
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for param in model.parameters():
        if lora and param.requires_grad:
            param.data = param.data.float()  # as peft leaves adapters, and as ours are
    rows = [torch.cat([batch.prompt.ids, part.ids], dim=1) for part in (batch.chosen, batch.rejected)]
    width = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    inputs = {
        "input_ids": torch.cat([pad(row, (0, width - row.shape[1])) for row in rows]),
        "attention_mask": torch.cat([pad(torch.ones_like(row), (0, width - row.shape[1])) for row in rows]),
        "completion_mask": torch.cat(
            [
                pad(
                    torch.cat([torch.zeros_like(batch.prompt.ids), torch.ones_like(part.ids)], 1),
                    (0, width - row.shape[1]),
                )
                for row, part in zip(rows, (batch.chosen, batch.rejected), strict=True)
            ]
        ),
    }  # fmt: skip
    if cached:
        trainer.precompute_ref_logps = True
        inputs["ref_chosen_logps"] = inputs["ref_rejected_logps"] = torch.full(
            (len(batch),), -100.0, device=args.device
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        # The trainer counts tokens and the like only when it logs; the loss is what is timed.
        return descend(trainer.compute_loss(model, dict(inputs)), optimizer)

    return step


def authors(path: Path, batch: PreferenceBatch, args: argparse.Namespace, lora: bool) -> Step:
    """Their scheme: each pair twice, the second time as user 0; policy and a second reference model on all four rows.

    Full logits at every position, as `get_batch_logps` of the DPO reference code has them.
    """
    torch.manual_seed(0)
    policy = RandomPolicy(path, args, lora)
    policy.build()
    policy.to(args.device).train()
    reference = copy.deepcopy(policy.lm).requires_grad_(False).eval()
    vectors = torch.nn.Embedding(len(batch) + 1, 10 * policy.token_embeddings().shape[1], device=args.device)
    params = [*(p for p in policy.lm.parameters() if p.requires_grad), *vectors.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    users = torch.cat([torch.arange(1, len(batch) + 1), torch.zeros(len(batch), dtype=torch.long)]).to(args.device)
    embed = policy.lm.get_input_embeddings()

    def log_probs(lm: torch.nn.Module, part: Tokens, with_user: bool) -> torch.Tensor:
        ids = torch.cat([batch.prompt.ids, part.ids], dim=1).repeat(2, 1)
        inputs = embed(ids)
        if with_user:
            soft = vectors(users).view(len(users), 10, -1).to(inputs.dtype)
            inputs = torch.cat([inputs[:, :1], soft, inputs[:, 1:]], dim=1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        logits = lm(inputs_embeds=inputs, attention_mask=mask).logits
        shift = inputs.shape[1] - ids.shape[1]
        labels = ids[:, 1:]
        scores = logits[:, shift:-1].float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return scores[:, -part.ids.shape[1] :].sum(-1)

    def step() -> float:
        own = log_probs(policy.lm, batch.chosen, True) - log_probs(policy.lm, batch.rejected, True)
        with torch.no_grad():
            fixed = log_probs(reference, batch.chosen, False) - log_probs(reference, batch.rejected, False)
        losses = -torch.nn.functional.logsigmoid(BETA * (own - fixed))
        return descend(losses.mean(), optimizer)

    return step


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Take the step that a loss asks for; return the loss."""
    loss.backward()
    clip_gradients([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def contenders(
    path: Path, batch: PreferenceBatch, args: argparse.Namespace, lora: bool
) -> dict[str, Callable[[], Step]]:
    """Return what makes each contender, by name."""
    makers = {
        "TRL DPO, online reference": lambda: trls(path, batch, args, lora, cached=False),
        "TRL DPO, precomputed reference": lambda: trls(path, batch, args, lora, cached=True),
        "authors' P-DPO scheme": lambda: authors(path, batch, args, lora),
        "our DPO, online reference": lambda: ours(path, batch, args, lora, personal=False, cached=False),
        "our DPO, cached reference": lambda: ours(path, batch, args, lora, personal=False, cached=True),
        "our P-DPO, online reference": lambda: ours(path, batch, args, lora, personal=True, cached=False),
        "our P-DPO, cached reference": lambda: ours(path, batch, args, lora, personal=True, cached=True),
        "our P-DPO, cached reference, sample_terms": lambda: ours(
            path, batch, args, lora, personal=True, cached=True, sampled=True
        ),
    }
    if not HAS_TRL:
        makers = {name: make for name, make in makers.items() if not name.startswith("TRL")}
    if getattr(args, "compiled", False):
        makers["our P-DPO, cached reference, torch_compile"] = lambda: ours(
            path, batch, args, lora, personal=True, cached=True, compiled=True
        )
    if getattr(args, "packed", False):
        makers["our P-DPO, cached reference, packing"] = lambda: ours(
            path, batch, args, lora, personal=True, cached=True, packed=True
        )
    return makers


def size_of(args: argparse.Namespace) -> str:
    """Say in words how large a batch was."""
    return f"{args.pairs} {'pair' if args.pairs == 1 else 'pairs'} in a batch"


def environment(args: argparse.Namespace) -> str:
    """Say in words what a measurement ran on."""
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return (
        f"{machine}, {platform.machine()}; {args.dtype}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {'trl ' + version('trl') if HAS_TRL else 'no trl'}"
    )
