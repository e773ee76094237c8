"""Script that writes the configuration and tokenizer of the built-in style model; training creates its weights.

`python -m prlhf_lightning.simulation.blank_model FOLDER`, then `fit --config configs/style_lm_sft.yaml`.
"""

from __future__ import annotations

import re
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prlhf_lightning.simulation.grammar import ATTRIBUTES, PROMPTS
from prlhf_lightning.simulation.phrases import FRAMES, OFFERS, OPENINGS, TIPS
from prlhf_lightning.simulation.users import state_preference

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def vocabulary() -> list[str]:
    """Return every word and mark of prompts, answers and stated preferences, sorted."""
    texts = [*PROMPTS, *(tip for tips in TIPS.values() for tip in tips)]
    texts += [text for wordings in (*OPENINGS.values(), *OFFERS.values()) for text in wordings]
    texts += [text.replace("{tip}", "") for frames in FRAMES.values() for wordings in frames for text in wordings]
    texts += [state_preference(values) for values in ATTRIBUTES.values()]
    texts += [state_preference([values[0] for values in ATTRIBUTES.values()])]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that adds BOS and decodes to the original text."""
    vocab = {word: index for index, word in enumerate([*_SPECIAL, *vocabulary()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # No word starts with "##", so this adds a space before every word; `cleanup` removes it before marks.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def write(folder: str) -> None:
    """Write `config.json` and the tokenizer's files."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1])
