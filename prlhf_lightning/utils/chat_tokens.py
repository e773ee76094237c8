"""Tokens that end a model's answer, and rendering of chat templates to find them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.template_limits import TemplateLimitError, limit_templates

_KEPT = "model_generation_config"  # attribute of a tokenizer with its model's generation config


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer, without duplicates, the tokenizer's EOS first.

    These are the tokenizer's EOS, all end-of-sequence tokens of the generation config, and the special token that the
    chat template writes after an assistant's message, such as `<|im_end|>`, `<end_of_turn>` or `<|eot_id|>`, even if
    the base model's EOS is `<|endoftext|>`. A turn that ends in ordinary text adds no token.

    Args:
        tokenizer: The model's tokenizer, with or without a chat template.
        generation_config: The base model's; its `eos_token_id` may be one token or a list. Ids without a token, such as
            -1, are ignored with a warning. None uses the config stored by `remember_end_tokens`, if any.

    Raises:
        ConfigurationError: The `eos_token_id` of the generation config is not an integer or a list of integers.
    """
    config = generation_config or getattr(tokenizer, _KEPT, None)
    found = [tokenizer.eos_token_id, *_configured(tokenizer, config)]
    known = [int(token) for token in found if token is not None]
    return tuple(dict.fromkeys([*known, *_turn_end(tokenizer, known)]))


def remember_end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> None:
    """Store a model's generation config in its tokenizer, so all code that encodes answers ends them as the model does.

    Saving the tokenizer to a folder does not save it.
    """
    setattr(tokenizer, _KEPT, generation_config)


def _configured(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Return the end tokens of a generation config that the tokenizer has."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids = [token for token in listed if token is not None]
    if wrong := [token for token in ids if type(token) is not int]:
        raise ConfigurationError(
            "eos_token_id in generation_config.json (or, without it, config.json) of the model "
            f"{tokenizer.name_or_path} holds {str(wrong[0])[:40]!r}, of type {type(wrong[0]).__name__}; write the id "
            "of the token, a whole number, or a list of ids."
        )
    known = set(tokenizer.get_vocab().values())
    if unknown := [str(token) for token in ids if token not in known]:
        warnings.warn(
            f"eos_token_id of the model's generation_config.json (or config.json) holds {', '.join(unknown)}, which "
            "its tokenizer does not have, so it never ends an answer.",
            stacklevel=3,
        )
    return [token for token in ids if token in known]


def _turn_end(tokenizer: PreTrainedTokenizerBase, known: Sequence[int]) -> list[int]:
    """Return the special token at the end of an assistant's message in the chat template, if it is not in `known`."""
    if not tokenizer.chat_template:
        return []
    specials = _special_tokens(tokenizer)
    # If the conversation continues, the tokens after an answer are those of its end and of the next turn's start.
    inner = list(_specials_after_answer(tokenizer, specials, goes_on=True))
    if set(inner) & set(known):
        return []
    last = list(_specials_after_answer(tokenizer, specials, goes_on=False))
    # Templates may end the last message with another token than earlier ones (`<|return|>` and `<|end|>` of gpt-oss).
    # The model generates the last message.
    found = (last or inner)[:1]
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return [token for token in found if token not in others]


def _specials_after_answer(
    tokenizer: PreTrainedTokenizerBase, specials: dict[str, int], goes_on: bool
) -> Iterator[int]:
    """Yield the special tokens directly after an assistant's message; the first may follow white space."""
    turns = [("user", QUESTION), ("assistant", ANSWER), *([("user", QUESTION)] if goes_on else [])]
    text = rendered(tokenizer, [{"role": role, "content": content} for role, content in turns])
    start = text.rfind(ANSWER)
    if start < 0 or not specials:
        return
    rest = text[start + len(ANSWER) :].lstrip()
    longest_first = sorted(specials, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    while match := pattern.match(rest):
        yield specials[match[0]]
        rest = rest[match.end() :]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the special tokens by their text."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: number for text, number in (named | added).items() if text}


limit_templates()  # all code that renders conversations imports this module

#: Placeholders for a question, an answer and a system message; no template contains or changes them.
QUESTION, ANSWER, SYSTEM = "Qzquestion7", "Azanswer7", "Szsystem7"


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Render a conversation with the chat template; empty if the template rejects it or omits a message.

    If the template rejects it, it is tried with contents as lists of parts, as templates of multimodal models expect,
    and with a system message, which some templates require.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        messages: The conversation. All contents are strings.
        tools: Tool definitions, or None.

    Raises:
        TemplateLimitError: The template exceeds the limits of computation.
    """
    if not tokenizer.chat_template:
        return ""
    starts: list[list[dict[str, Any]]] = [[]]
    if messages[0]["role"] != "system":
        starts.append([{"role": "system", "content": SYSTEM}])
    for start in starts:
        whole = [*start, *messages]
        as_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in whole]
        for form in (whole, as_parts):
            try:
                text = str(tokenizer.apply_chat_template(form, tools=tools, tokenize=False))
            except TemplateLimitError:
                raise
            except Exception:  # templates may raise any error
                continue
            if all(message["content"] in text for message in messages):
                return text
    return ""
