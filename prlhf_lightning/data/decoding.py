"""Tokens to text, as they stand after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space at the start of a token
_BEFORE = 8  # tokens; more than any character or word of which the last ones may be a part


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Return the text of tokens as it follows the text of others, without special tokens.

    Spaces are as the model wrote them: some tokenizers would take out that of " ." and " n't".
    """
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start = str(tokenizer.decode(list(before), **how)) if before else ""
    return str(tokenizer.decode([*before, *ids], **how))[len(start) :]


def loses_first_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a space at the start is lost in decoding, as by tokenizers that are made of SentencePiece's."""
    token = next(
        (id_ for text, id_ in tokenizer.get_vocab().items() if text.startswith(_SPACE) and len(text) > 1), None
    )
    return token is not None and not decode(tokenizer, [token]).startswith(" ")


def read_on_from(prompt: Sequence[int], as_it_stands: bool, first_space_is_lost: bool) -> Sequence[int]:
    """Return the tokens that an answer must be decoded after.

    A prompt that is taken as it stands goes on in the answer, whose first token may begin with a space. What a chat
    template writes does not: there a space at the start is the template's, and is left out as transformers does.

    Args:
        prompt: The prompt's tokens.
        as_it_stands: Whether the answer goes on with the prompt's text.
        first_space_is_lost: See `loses_first_space`.
    """
    return prompt[-_BEFORE:] if as_it_stands and first_space_is_lost else ()
