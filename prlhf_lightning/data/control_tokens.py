"""Control tokens that rows hold already: BOS, EOS, ends of turns, or a whole rendered template as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.conversations import plain_text
from prlhf_lightning.data.implicit_prompts import Note
from prlhf_lightning.data.records import FeedbackRecord

_BAR = "\N{FULLWIDTH VERTICAL LINE}"  # of DeepSeek's tokens
# Beginnings of turns in well-known templates. What is written in people's own texts too, such as <s>, is not here.
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
        tokenizer: Whose special tokens are looked for too; without one only those of well-known templates are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        own = set() if tokenizer is None else _special(tokenizer)
        known = sorted({*_TURNS, *_OTHERS, *own}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, known)))
        self._starts = "".join(sorted({token[0] for token in known}))

    def notes(self, record: FeedbackRecord) -> Iterator[Note]:
        """Yield what is to be told about a record, a note for each field that holds such tokens."""
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
                )
            else:
                yield Note(
                    field,
                    f"holds the control token {found!r}",
                    "write the text alone: the tokenizer and its chat template add such tokens",
                )

    def _found(self, text: str) -> str | None:
        if not any(start in text for start in self._starts):  # most texts, and many times as fast
            return None
        found = self._any.search(text)
        return found[0] if found else None


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens that nobody writes by chance."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    tokens -= {str(token) for token in (tokenizer.unk_token, tokenizer.pad_token) if token} - {str(tokenizer.eos_token)}
    return {token for token in tokens if len(token) > 2 and not token.isalnum()}
