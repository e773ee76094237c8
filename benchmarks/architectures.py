"""Which Hugging Face architectures go all the way: `fit`, `adapt`, `generate`, `export`, and back into transformers.

    python benchmarks/architectures.py --out docs/benchmarks/architectures.md

Each model is tiny, with random weights and the byte-level tokenizer that is shipped; nothing is downloaded. With LoRA
and with all weights trained, each goes through the command line, and these are checked:

- the log-probabilities of ragged batches, with users' vectors, adapters and without, are those of the model's own
  logits, row by row (in float32, to 1e-3),
- `fit` for two steps, with a validation that writes,
- `adapt` learns a new user,
- `generate` writes for two users and the new one, in one batch,
- `export`, and what transformers alone writes with the folder and its users' vectors, one text at a time, is the same;
  so is what `generate` writes with exported adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from peft.tuners.lora import LoraLayer
from reporting import about, tell
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import prlhf_lightning
from prlhf_lightning import CausalLMPolicy, LoRA
from prlhf_lightning.cli.main import main as command_line
from prlhf_lightning.inference.kv_cache import keeps_keys_and_values
from prlhf_lightning.types import SoftPrompt, Tokens

TOKENIZER = Path(prlhf_lightning.__file__).parent / "assets/byte-lm"
PROMPTS = ("Hi", "What is the best way to cook an egg?", "Name three animals that live in the sea.")
TOLERANCE = 1e-3

IDS = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
BASE = {**IDS, "pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {**BASE, "num_attention_heads": 4, "max_position_embeddings": 512, "intermediate_size": 64}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GPT = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama": lambda: hf.LlamaConfig(**GROUPED),
    "Mistral": lambda: hf.MistralConfig(**HEADS, sliding_window=16),
    "Qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "Qwen3": lambda: hf.Qwen3Config(**HEADS),
    "Gemma 2": lambda: hf.Gemma2Config(**HEADS, query_pre_attn_scalar=8, sliding_window=16),
    "Gemma 3": lambda: hf.Gemma3TextConfig(**HEADS, query_pre_attn_scalar=8, sliding_window=16),
    "Phi-2": lambda: hf.PhiConfig(**ATTENTION),
    "Phi-3": lambda: hf.Phi3Config(**GROUPED),
    "OLMo 2": lambda: hf.Olmo2Config(**GROUPED),
    "OLMo 3": lambda: hf.Olmo3Config(**GROUPED, sliding_window=16),
    "Granite": lambda: hf.GraniteConfig(
        **GROUPED, logits_scaling=4.0, embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.3
    ),
    "SmolLM3": lambda: hf.SmolLM3Config(**GROUPED),
    "GPT-2": lambda: hf.GPT2Config(**GPT),
    "GPT-J": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**ATTENTION),
    "OPT": lambda: hf.OPTConfig(**ATTENTION, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "BLOOM": lambda: hf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
    "Falcon": lambda: hf.FalconConfig(**ATTENTION),
    "StableLM": lambda: hf.StableLmConfig(**GROUPED),
    "Cohere": lambda: hf.CohereConfig(**GROUPED),
    "Cohere 2": lambda: hf.Cohere2Config(**GROUPED, sliding_window=16),
    "MPT": lambda: hf.MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    "StarCoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "GLM-4": lambda: hf.Glm4Config(**HEADS),
    "Nemotron": lambda: hf.NemotronConfig(**GROUPED),
    "EXAONE 4": lambda: hf.Exaone4Config(**GROUPED, sliding_window=16, sliding_window_pattern=2),
    "ERNIE 4.5": lambda: hf.Ernie4_5Config(**HEADS),
    "Apertus": lambda: hf.ApertusConfig(**GROUPED),
    "GPT-OSS": lambda: hf.GptOssConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "DeepSeek-V3": lambda: hf.DeepseekV3Config(
        **{**GROUPED, "num_key_value_heads": 4, "moe_intermediate_size": 16},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "Mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "Qwen2-MoE": lambda: hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**HEADS, **EXPERTS),
    "OLMoE": lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "Granite-MoE": lambda: hf.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "Llama 4": lambda: hf.Llama4TextConfig(**HEADS, num_local_experts=2, intermediate_size_mlp=64),
    "MiniMax": lambda: hf.MiniMaxConfig(**HEADS, num_local_experts=2, num_experts_per_tok=1, block_size=16),
    "Qwen3-Next": lambda: hf.Qwen3NextConfig(
        **HEADS,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        full_attention_interval=2,
    ),
    "LFM2": lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "Jamba": lambda: hf.JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8
    ),
    "Bamba": lambda: hf.BambaConfig(**GROUPED, attn_layer_indices=[1], **MAMBA2),
    "Falcon-H1": lambda: hf.FalconH1Config(**GROUPED, mamba_d_ssm=64, **MAMBA2),
    "Zamba2": lambda: hf.Zamba2Config(
        **{**ATTENTION, "num_hidden_layers": 4},
        layers_block_type=["mamba", "mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        num_mem_blocks=1,
        adapter_rank=4,
    ),
    "RecurrentGemma": lambda: hf.RecurrentGemmaConfig(
        **{**HEADS, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16
    ),
    "Mamba": lambda: hf.MambaConfig(**BASE, state_size=8),
    "Falcon-Mamba": lambda: hf.FalconMambaConfig(**BASE, state_size=8),
    "Mamba-2": lambda: hf.Mamba2Config(**BASE, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16),
    "RWKV-4": lambda: hf.RwkvConfig(
        vocab_size=259, bos_token_id=1, eos_token_id=2, hidden_size=32, num_hidden_layers=2, context_length=512
    ),
}


@dataclass
class Verdict:
    """What became of one model.

    Attributes:
        adapted: What LoRA adapts.
        shared: Whether a prompt is computed once for both its completions.
        batched: Whether texts are written in one batch.
        failed: What failed, by `LoRA` and `full`.
    """

    adapted: str = ""
    shared: bool = False
    batched: bool = False
    failed: dict[str, str] = field(default_factory=dict)


class Failure(Exception):
    """A command or a check that did not go well."""


def run(*words: Any) -> None:
    """Run a command."""
    told = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        warnings.simplefilter("ignore")
        try:
            command_line([str(word) for word in words])
        except SystemExit as error:
            if error.code:
                raise Failure(f"{words[0]}: {error.code if isinstance(error.code, str) else told.getvalue()}") from None
        except Exception as error:
            raise Failure(f"{words[0]}: {type(error).__name__}: {error}") from error


def rows() -> Iterator[dict[str, str]]:
    """Yield votes of two users."""
    for i in range(24):
        prompt = f"{PROMPTS[i % 3]} {i % 8}"
        yield {"user_id": ("ann", "bob")[i % 2], "prompt": prompt, "chosen": f"yes {i}", "rejected": "no" * (1 + i % 3)}


def write(path: Path, content: Any) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def check_scores(base: Path, lora: LoRA | None) -> CausalLMPolicy:
    """See that scores in batches are the model's own, row by row."""
    policy = CausalLMPolicy(str(base), lora=lora)
    policy.build()
    torch.manual_seed(1)
    for name, param in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    policy.eval()
    prompts = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    sides = [[ids[1 : 4 + 3 * i] for i, ids in enumerate(order)] for order in (prompts[::-1], prompts)]
    vectors = 0.3 * torch.randn(len(prompts), 4, policy.token_embeddings().shape[1])
    batch = Tokens.from_lists(prompts), [Tokens.from_lists(side) for side in sides], SoftPrompt.full(vectors)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for lm, found in ((policy.lm, policy.log_probs(*batch)), (plain, policy.reference_log_probs(*batch))):
            for part, side in zip(found, sides, strict=True):
                for i, ids in enumerate(side):
                    own = next_logits(lm, [*prompts[i], *ids], vectors[i])[-len(ids) - 1 : -1].log_softmax(-1)
                    own = own.gather(-1, torch.tensor(ids)[:, None])[:, 0]
                    error = (own - part.tokens[i][part.mask[i]]).abs().max().item()
                    if not error < TOLERANCE:
                        raise Failure(f"scores: {error:.1e} off")
    return policy


def next_logits(lm: PreTrainedModel, ids: list[int], vectors: Tensor) -> Tensor:
    """Return the logits `[L, V]` of a model that reads one row, a user's vectors after BOS, and remembers nothing."""
    words = lm.get_input_embeddings()(torch.tensor(ids))
    whole = torch.cat([words[:1], vectors.to(words.dtype), words[1:]])[None]
    logits: Tensor = lm(inputs_embeds=whole, use_cache=False).logits[0].float()
    return logits


@torch.no_grad()
def check_export(folder: Path, answers: list[dict[str, Any]]) -> None:
    """See that transformers alone writes the same, one text at a time."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    users = load_file(folder / "user_vectors.safetensors")
    for answer in answers:
        prompt, ids = tokenizer(answer["prompt"])["input_ids"], list[int]()
        while len(ids) < answer["completion_tokens"]:
            ids.append(int(next_logits(lm, [*prompt, *ids], users[answer["user_id"]])[-1].argmax()))
        if tokenizer.decode(ids, skip_special_tokens=True) != answer["completion"]:
            raise Failure(f"export: transformers writes otherwise for {answer['user_id']}, {answer['prompt']!r}")


def try_all(base: Path, folder: Path, lora: LoRA | None, verdict: Verdict) -> None:
    """Take one model through everything, with LoRA or without."""
    policy = check_scores(base, lora)
    if lora is None:
        verdict.shared, verdict.batched = policy.shortcuts.shared_prompt, keeps_keys_and_values(policy.lm)
    else:
        verdict.adapted = adapted_layers(policy)
    votes = write(folder / "votes.jsonl", rows())
    new = write(folder / "new.jsonl", ({**row, "user_id": "eve"} for row in list(rows())[:6]))
    prompts = write(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in PROMPTS))
    settings = {
        "model.user_model": "IndividualUserModel",
        "model.user_model.num_tokens": 4,
        "model.policy": "CausalLMPolicy",
        "model.policy.model": base,
        "model.policy.lora": "null" if lora is None else json.dumps({"rank": lora.rank}),
        "model.loss": "DPOLoss",
        "model.optim.lr": 1e-3,
        "model.optim.user_lr": 1e-1,
        "data.source": "FileSource",
        "data.source.train": votes,
        "data.validation_fraction": 0.25,
        "data.batch_size": 4,
        "data.cache_dir": folder / "cache",
        "collapse.max_new_tokens": 8,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
    }
    run("fit", *(word for name, value in settings.items() for word in (f"--{name}", value)))
    (last,) = folder.rglob("last.ckpt")
    adapted = folder / "adapted.ckpt"
    run("adapt", "--model", last, "--feedback", new, "--output", adapted)
    asked = ["--prompts", prompts, "--user", "ann", "bob", "eve", "--max_new_tokens", 16]
    run("generate", "--model", adapted, *asked, "--output", folder / "answers.jsonl")
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    run("export", "--model", adapted, "--output", folder / "exported")
    check_export(folder / "exported", answers)
    if lora is not None:
        run("export", "--model", adapted, "--output", folder / "adapters", "--adapters", "true")
        run("generate", "--model", folder / "adapters", *asked, "--output", folder / "again.jsonl")
        again = [json.loads(line) for line in (folder / "again.jsonl").read_text().splitlines()]
        if again != answers:
            raise Failure("export --adapters: `generate` writes otherwise")


def adapted_layers(policy: CausalLMPolicy) -> str:
    """Return what LoRA adapts, in words."""
    adapted = {name for name, module in policy.lm.named_modules() if isinstance(module, LoraLayer)}
    parts = {name.rpartition(".")[0] for name, _ in policy.lm.named_modules() if name.endswith(".base_layer")}
    head = policy.lm.get_output_embeddings()
    left = {
        name.rpartition(".")[2]
        for name, module in policy.lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
        if name not in adapted and name.removesuffix(".base_layer") not in parts
    }
    told = "all linear layers" + (f" but {', '.join(f'`{name}`' for name in sorted(left))}" if left else "")
    if any(".experts" in name for name in adapted):
        return f"{told}; experts and routers"
    has_experts = any(param.ndim == 3 and "expert" in name for name, param in policy.lm.named_parameters())
    return f"{told}; no experts" if has_experts else told


def table(verdicts: dict[str, Verdict]) -> str:
    """Return the verdicts as a Markdown table, architectures that are alike in one row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, verdict in verdicts.items():
        works = "; ".join(f"{kind}: {why}" for kind, why in verdict.failed.items()) or "yes"
        once = "yes" if verdict.shared else "no"
        alike.setdefault((works, verdict.adapted, once, "together" if verdict.batched else "one by one"), []).append(
            name
        )
    lines = ["| architectures | works | LoRA (`all-linear`) adapts | prompt computed once | texts are written |"]
    lines += ["|---|---|---|---|---|"]
    lines += ["| " + " | ".join([", ".join(names), *row]) + " |" for row, names in alike.items()]
    return "\n".join(lines)


def main() -> None:
    """Try all models, or those named, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    started, verdicts = time.perf_counter(), dict[str, Verdict]()
    for name in args.models:
        verdicts[name] = verdict = Verdict()
        for kind, lora in (("LoRA", LoRA(rank=4)), ("full", None)):
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                try:
                    torch.manual_seed(0)
                    AutoModelForCausalLM.from_config(CONFIGS[name]()).float().save_pretrained(folder / "base")
                    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "base")
                    try_all(folder / "base", folder, lora, verdict)
                except Exception as error:
                    name_of_error = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
                    verdict.failed[kind] = f"{name_of_error}{error}".replace("\n", " ")
        print(name, verdict, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    made_with = f"{about()}, transformers {hf.__version__}, peft {peft.__version__}; {seconds:.0f} s."
    tell(f"{table(verdicts)}\n\n{made_with}", args.out)


if __name__ == "__main__":
    main()
