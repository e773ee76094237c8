"""Escaping of control tokens in user-written text, so a text cannot forge a turn of the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.conversations import Note, plain_text
from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.utils.chat_tokens import ANSWER, QUESTION, SYSTEM, rendered

#: Marker inserted into a control token that is only text, so no tokenizer finds the token. It is a Unicode
#: noncharacter, which texts do not contain, and it is removed before tokenization.
MARK = "\ufdd0"
# Placeholders for a tool, a call id (nine letters and digits, as Mistral's templates require), and a result.
_TOOL, _CALL, _RESULT = "Tztool7", "Czcalled7", "Rzresult7"


class TokenEscaper:
    """Finds the control tokens of a tokenizer in texts and escapes them: marks them as text.

    Control tokens are all special tokens, and the other added tokens that the chat template writes around messages,
    tools and their results (DeepSeek's `<|User|>` is not special). Pairs such as `<think>` and `</think>`, between
    which the template writes only the assistant's text, are part of answers. In an assistant's message they are not
    control tokens; elsewhere only if they are special.

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
        """Mark the control tokens in a text as text; `role` is the author's role."""
        return (self._in_answers if role == "assistant" else self._everywhere).sub(_marked, text)

    def escape_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Escape all strings of messages, except roles that are plain words."""
        return [
            {**self.within(message, role), "role": role if role.isidentifier() else self.escape(role)}
            for message in messages
            for role in [message["role"]]
        ]

    def within(self, value: Any, role: str = "user") -> Any:
        """Escape a string, or all strings of nested lists and mappings."""
        if isinstance(value, str):
            return self.escape(value, role)
        if isinstance(value, Mapping):
            return {self.within(key): self.within(item, role) for key, item in value.items()}
        return [self.within(item, role) for item in value] if isinstance(value, Sequence) else value


def unescaped(text: str) -> str:
    """Undo `escape`: remove the marks from a text."""
    return text.replace(MARK, "")


def _marked(match: re.Match[str]) -> str:
    return match[0][0] + MARK + match[0][1:]


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # a pattern that never matches


def _end(token: str) -> str:
    """Return the closing token of an opening one such as `<think>` or `[THINK]`."""
    return token[:1] + "/" + token[1:]


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Render short conversations with all roles and with a tool."""
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
    """Return whether text of another role than the assistant is between `start` and `end` in a conversation."""
    places = [match.start() for match in re.finditer("|".join([QUESTION, SYSTEM, _RESULT, _TOOL]), text)]
    return any(
        text.rfind(start, 0, place) > text.rfind(end, 0, place) and text.find(end, place) >= 0 for place in places
    )


_BAR = "\N{FULLWIDTH VERTICAL LINE}"  # of DeepSeek's tokens
# Turn starts of well-known templates, without those that are common in ordinary text, such as <s>.
_TURNS = (
    "[INST]", "<<SYS>>", "<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|header_start|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|start_of_role|>", "<|START_OF_TURN_TOKEN|>", f"<{_BAR}User{_BAR}>",
    f"<{_BAR}Assistant{_BAR}>", "<|turn>", "<|start|>",
)  # fmt: skip
_OTHERS = (
    "[/INST]", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eot|>", "<|end_of_role|>", "<|END_OF_TURN_TOKEN|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", f"<{_BAR}end▁of▁sentence{_BAR}>", "<turn|>",
)  # fmt: skip


class ControlTokens:
    """Finds control tokens in the texts of rows.

    Args:
        tokenizer: Its special tokens are searched too; without one, only those of well-known templates.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        own = set() if tokenizer is None else _special(tokenizer)
        known = sorted({*_TURNS, *_OTHERS, *own}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, known)))
        self._starts = "".join(sorted({token[0] for token in known}))

    def notes(self, record: FeedbackRecord) -> Iterator[Note]:
        """Yield a note for each field of a record with control tokens."""
        texts = (record.prompt, record.chosen, record.rejected)
        for field, text in zip(("prompt", *record.fields), texts, strict=True):
            if text is None or (found := self._found(plain_text(text))) is None:
                continue
            turn = next((one for one in _TURNS if one in text), None) if isinstance(text, str) else None
            if field == "prompt" and turn is not None:
                yield Note(
                    field,
                    f"is a conversation that a chat template has rendered, as plain text (it holds {turn!r})",
                    "write it as a list of messages, so that the model's own template is applied, and once",
                    "is a conversation that a chat template has rendered, as plain text",
                )
            else:
                yield Note(
                    field,
                    f"holds the control token {found!r}",
                    "write the text alone: the tokenizer and its chat template add such tokens",
                    "holds the control token",
                )

    def _found(self, text: str) -> str | None:
        if not any(start in text for start in self._starts):  # fast path for most texts
            return None
        found = self._any.search(text)
        return found[0] if found else None


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens that do not occur in ordinary text."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    tokens -= {str(token) for token in (tokenizer.unk_token, tokenizer.pad_token) if token} - {str(tokenizer.eos_token)}
    return {token for token in tokens if len(token) > 2 and not token.isalnum()}
