"""Rows, files and tokenizers for the tests of the data layer, all made on the spot."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [*(f"w{i}" for i in range(40)), "one", "two", "three", "four", "five", "six", "Hi", "user:", "about"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def turn(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = turn("user", "Hi"), turn("assistant", "one"), turn("assistant", "two")


def row(number=0, user="ann", **changes):
    fields = {
        "user_id": user,
        "prompt": f"w{number % 40} w{number // 40}",
        "chosen": "one two",
        "rejected": "three four",
    }
    return {**fields, **changes}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def word_tokenizer(bos=True, eos_too=False, template=None):
    """One token a word; `<bos>` first and `<eos>` last where asked for."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|start|>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or eos_too:
        single = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos_too)
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer():
    """A byte-level BPE tokenizer with EOS but without BOS, as GPT-2's or Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["one two"],
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<eos>"], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
