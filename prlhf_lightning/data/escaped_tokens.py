"""Control tokens in texts that people write: kept as text, so that nobody can forge a turn of the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

#: Stands inside a control token that is only text, so that no tokenizer finds the token there. It is a noncharacter of
#: Unicode, which texts do not hold, and it is taken out again before text becomes tokens.
MARK = "\ufdd0"


class TokenEscaper:
    """Finds the control tokens of a tokenizer in texts, and escapes them: marks them as text.

    Control tokens are all special tokens, and the other added tokens that the chat template writes around the messages
    of a conversation (DeepSeek's `<|User|>` is not special). In an assistant's message, pairs such as `<think>` and
    `</think>` that the template does not write around messages are part of the answer, hence no control tokens.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        around = _around_messages(tokenizer)
        turns = {token for token in added if token in around and not token.strip().isalnum() and not token.isspace()}
        named = {text for text in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if text}
        special = {token for token, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
        every = special | turns
        pairs = {token for token in every - turns - named if _partner(token) in every - turns - named}
        self._everywhere, self._in_answers = _pattern(every), _pattern(every - pairs)

    def last(self, text: str) -> re.Match[str] | None:
        """Return the last control token of a rendered text."""
        found = None
        for match in self._everywhere.finditer(text):
            found = match
        return found

    def escape(self, text: str, role: str = "user") -> str:
        """Return a text with its control tokens marked as text; `role` is that of its author."""
        return (self._in_answers if role == "assistant" else self._everywhere).sub(_marked, text)

    def escape_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in which all strings but the roles are as `escape` returns them."""
        return [{**self.within(message, message["role"]), "role": message["role"]} for message in messages]

    def within(self, value: Any, role: str = "user") -> Any:
        """Return a string, or lists and mappings with all their strings, as `escape` returns them."""
        if isinstance(value, str):
            return self.escape(value, role)
        if isinstance(value, Mapping):
            return {key: self.within(item, role) for key, item in value.items()}
        return [self.within(item, role) for item in value] if isinstance(value, Sequence) else value


def unescaped(text: str) -> str:
    """Return a text as it was before control tokens were marked."""
    return text.replace(MARK, "")


def _marked(match: re.Match[str]) -> str:
    return match[0][0] + MARK + match[0][1:]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which never matches


def _partner(token: str) -> str:
    """Return the end that belongs to a start such as `<think>` or `[THINK]`, or the other way round."""
    opening, rest = token[:1], token[1:]
    return opening + (rest[1:] if rest.startswith("/") else "/" + rest)


def _around_messages(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template writes around the messages of a conversation; nothing if it refuses it."""
    if not tokenizer.chat_template:
        return ""
    # The last message is the user's: templates write empty thoughts into the last message of an assistant only.
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates raise whatever their authors chose
        return ""
