"""Small chat models of the structure that families of models have, trained to know a few answers by heart.

Each family has its own kind of tokenizer, chat template, end of a turn and generation config. The models are trained
by plain transformers on whole conversations of two questions, so that one which does not stop writes on as the user.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

#: What the models are asked, and what they answer.
ANSWERS = {
    "What helps to sleep?": "Go to bed early, and read.",
    "How do I stay calm?": "Breathe slowly. Walk more!",
    "What is good to eat?": "Bread and soup, maybe rice.",
}

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What distinguishes the chat models of a family.

    Attributes:
        template: The chat template.
        special: The special tokens; their ids are their places.
        names: Which of them is `eos_token`, `bos_token` and so on.
        ends: The ids of the tokens that end an answer.
        generation: The settings of the generation config, `eos_token_id` among them.
        spaces: How SentencePiece-like tokenizers write the space before a text: `first`, `never`; None for byte-level.
        writes_bos: Whether the tokenizer begins a text with BOS.
    """

    template: str
    special: Sequence[str]
    names: dict[str, str]
    ends: tuple[int, ...]
    generation: dict[str, Any] = field(default_factory=dict)
    spaces: str | None = None
    writes_bos: bool = False


FAMILIES = {
    "llama-3": Family(
        _LLAMA_3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        (1, 4),
        {"eos_token_id": [1, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        writes_bos=True,
    ),
    "gemma": Family(
        _GEMMA,
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        (1, 5),
        {"eos_token_id": [1, 5]},
        spaces="never",
        writes_bos=True,
    ),
    "chatml-over-base": Family(
        _CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|endoftext|>"},
        (0, 2),
        {"eos_token_id": 0},
    ),
    "qwen": Family(
        _CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        (2, 0),
        {"eos_token_id": [2, 0], "repetition_penalty": 1.1, "top_k": 20, "top_p": 0.8, "do_sample": True},
    ),
    "mistral": Family(
        _MISTRAL,
        ["<unk>", "<s>", "</s>"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        (2,),
        {"eos_token_id": 2},
        spaces="first",
        writes_bos=True,
    ),
    "phi": Family(
        _PHI,
        ["<unk>", "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"},
        (2, 4, 5),
        {"eos_token_id": [2, 4, 5]},
        spaces="first",
    ),
}


def conversation(*questions: str) -> list[dict[str, str]]:
    """Return a conversation with the questions' answers."""
    turns = [(question, ANSWERS[question]) for question in questions]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a family, with its chat template."""
    backend = _byte_level(family) if family.spaces is None else _sentencepiece(family)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in family.special])
    if family.writes_bos:
        bos = family.names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **family.names)
    made.chat_template = family.template
    return made


def make_model(name: str, folder: Path, steps: int = 70) -> Path:
    """Train a model of a family until it knows the answers by heart, and save it with its tokenizer."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    set_seed(0)
    ids = {f"{which}_id": tokenizer.convert_tokens_to_ids(token) for which, token in family.names.items()}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        **{which: number for which, number in ids.items() if which != "unk_token_id"},
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    questions = list(ANSWERS)
    texts = [conversation(one, questions[i - 1]) for i, one in enumerate(questions)]
    rows = [tokenizer.apply_chat_template(text, return_dict=False) for text in texts]
    width = max(map(len, rows))
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(lm.parameters(), 5e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        loss = lm(input_ids=inputs, attention_mask=mask, labels=inputs.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Written by hand, as transformers refuses to save what makers of models publish, such as top_k without do_sample.
    (folder / "generation_config.json").write_text(json.dumps(family.generation))
    return folder


def _texts() -> list[str]:
    return [text for pair in ANSWERS.items() for text in pair]


def _byte_level(family: Family) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(family.special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_texts(), trainer)
    return backend


def _sentencepiece(family: Family) -> Tokenizer:
    """Make a tokenizer as those that are converted from SentencePiece: `▁` for spaces, and bytes for the rest."""
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*family.special, *in_bytes], show_progress=False)
    backend.train_from_iterator(_texts(), trainer)
    made = json.loads(backend.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in in_bytes]
    backend = Tokenizer.from_str(json.dumps(made))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.spaces == "never":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=family.spaces, split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend
