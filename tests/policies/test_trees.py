from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import BloomConfig, Gemma3TextConfig, GPTNeoConfig, MambaConfig, MistralConfig, Qwen3Config
from transformers.integrations import flex_attention as integration

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, scoring, shortcuts
from prlhf_lightning.policies.scoring import Shortcuts
from prlhf_lightning.policies.trees import BLOCK, Forest, plant
from prlhf_lightning.types import SoftPrompt, Tokens

ARCHITECTURES = ["llama", "qwen", "qwen3", "gpt2", "neox"]
SIZES = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
UNFIT = {
    "windows": MistralConfig(**GATED, sliding_window=256),
    "some windows": Gemma3TextConfig(**GATED),
    "windows of its own": GPTNeoConfig(
        vocab_size=25, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "no positions": BloomConfig(vocab_size=25, hidden_size=32, n_layer=2, n_head=4),
    "recurrent": MambaConfig(vocab_size=25, hidden_size=32, num_hidden_layers=2),
}
ROWS = Shortcuts(head=True, shared_prompt=False)
TREES = Shortcuts(head=True, shared_prompt=False, trees=True)


@pytest.fixture(scope="module")
def paths(model_paths, tmp_path_factory):
    """The architectures of conftest, and those that only these tests need, as folders without weights."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in {"qwen3": Qwen3Config(**GATED), **UNFIT}.items():
        config.save_pretrained(folder / name)
    return model_paths | {name: str(folder / name) for name in ("qwen3", *UNFIT)}


def build(path: str, **kwargs) -> CausalLMPolicy:
    kwargs = {"lora": LoRA(rank=4), "packing": True} | kwargs
    policy = CausalLMPolicy(path, random_init=0, **kwargs)
    policy.build(with_reference=False)
    with torch.no_grad():
        for param in policy.parameters():  # so large that log-probs differ by more than rounding
            param.add_(0.2 * torch.randn_like(param))
    return policy.train()
