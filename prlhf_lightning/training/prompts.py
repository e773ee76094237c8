"""Texts that are given to a model in Python, to the ids that they had become as rows of its data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.schema import Text
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import Tokens


def to_tokens(
    prompts: Tokens | Sequence[Text],
    user_ids: Sequence[str],
    user_texts: Tokens | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizationSettings,
    device: torch.device,
) -> tuple[Tokens, Tokens]:
    """Return B prompts and B texts about their users as ids, those made here on `device`.

    Raises:
        ConfigurationError: One string stands where there should be a list, or the lists' lengths differ.
    """
    for name, value in (("prompt", prompts), ("user_ids", user_ids), ("user_text", user_texts)):
        if isinstance(value, str):
            raise ConfigurationError(f"{name} is a string; give a list, one entry a prompt, such as [{value[:40]!r}].")
    if len(prompts) != len(user_ids) or (user_texts is not None and len(user_texts) != len(prompts)):
        texts = "" if user_texts is None else f" and {len(user_texts)} texts about users"
        raise ConfigurationError(
            f"There are {len(prompts)} prompts for {len(user_ids)} users{texts}; give as many of each, repeating a "
            "prompt for each of its users."
        )
    nothing = Tokens.from_lists([[]] * len(prompts)).to(device)
    if isinstance(prompts, Tokens) and not isinstance(user_texts, Sequence):
        return prompts, nothing if user_texts is None else user_texts
    encode = FeedbackTokenizer(tokenizer, settings)
    if not isinstance(prompts, Tokens):
        if any(not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" for prompt in prompts if prompt):
            raise ConfigurationError(
                "prompt: the last message is the assistant's, which needs no answer; end with a message of the user, "
                "or go on with it by PersonalizedWriter and Generation(..., continue_final_message=True)."
            )
        prompts = Tokens.from_lists(encode.prompts(prompts)).to(device)
    if isinstance(user_texts, Sequence):
        limit = settings.max_user_text_length
        user_texts = Tokens.from_lists([ids[:limit] for ids in encode.user_texts(user_texts)]).to(device)
    return prompts, nothing if user_texts is None else user_texts
