"""Control tokens in texts that people write: kept as text, so that nobody can forge a turn of the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.chat_probes import ANSWER, QUESTION, SYSTEM, rendered

#: Stands inside a control token that is only text, so that no tokenizer finds the token there. It is a noncharacter of
#: Unicode, which texts do not hold, and it is taken out again before text becomes tokens.
MARK = "\ufdd0"
# Stand for a tool, a call of it (nine letters and digits, as Mistral's templates ask for), and its result.
_TOOL, _CALL, _RESULT = "Tztool7", "Czcalled7", "Rzresult7"


class TokenEscaper:
    """Finds the control tokens of a tokenizer in texts, and escapes them: marks them as text.

    Control tokens are all special tokens, and the other added tokens that the chat template writes around the messages
    of a conversation (DeepSeek's `<|User|>` is not special), and around tools and their results. Pairs such as
    `<think>` and `</think>` between which the template writes nobody's text but the assistant's are part of answers:
    they are no control tokens in an assistant's message, and elsewhere only if they are special.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        texts = _conversations(tokenizer)
        turns = {token for token in added if not token.strip().isalnum() and any(token in text for text in texts)}
        turns -= {token for token in turns if token.isspace()}
        named = {text for text in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if text}
        special = {token for token, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
        every = special | turns
        pairs = [(token, _end(token)) for token in every - named if _end(token) in every - named]
        own = {token for pair in pairs if not any(_encloses(*pair, text) for text in texts) for token in pair}
        self._everywhere, self._in_answers = _pattern(special | turns - own), _pattern(every - own)

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
        """Return messages in which all strings are as `escape` returns them, but roles that are plain words."""
        return [
            {**self.within(message, role), "role": role if role.isidentifier() else self.escape(role)}
            for message in messages
            for role in [message["role"]]
        ]

    def within(self, value: Any, role: str = "user") -> Any:
        """Return a string, or lists and mappings with all their strings, as `escape` returns them."""
        if isinstance(value, str):
            return self.escape(value, role)
        if isinstance(value, Mapping):
            return {self.within(key): self.within(item, role) for key, item in value.items()}
        return [self.within(item, role) for item in value] if isinstance(value, Sequence) else value


def unescaped(text: str) -> str:
    """Return a text as it was before control tokens were marked."""
    return text.replace(MARK, "")


def _marked(match: re.Match[str]) -> str:
    return match[0][0] + MARK + match[0][1:]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which never matches


def _end(token: str) -> str:
    """Return the end that belongs to a start such as `<think>` or `[THINK]`."""
    return token[:1] + "/" + token[1:]


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return short conversations with all roles and with a tool, as the chat template writes them."""
    asked, said = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    call = {"id": _CALL, "type": "function", "function": {"name": _CALL, "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": _RESULT, "name": _CALL, "tool_call_id": _CALL}
    parameters = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": _TOOL, "description": _TOOL, "parameters": parameters}}
    return [
        rendered(tokenizer, [asked, said, asked]),
        rendered(tokenizer, [{"role": "system", "content": SYSTEM}, asked, said, asked]),
        rendered(tokenizer, [asked, said, asked], [tool]),
        rendered(tokenizer, [asked, calling, result, said], [tool]),
    ]


def _encloses(start: str, end: str, text: str) -> bool:
    """Return whether what anybody but the assistant writes stands between `start` and `end` in a conversation."""
    places = [match.start() for match in re.finditer("|".join([QUESTION, SYSTEM, _RESULT, _TOOL]), text)]
    return any(
        text.rfind(start, 0, place) > text.rfind(end, 0, place) and text.find(end, place) >= 0 for place in places
    )
