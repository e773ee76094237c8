"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.decoding import decode

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of the first bytes of a character


class TextStream:
    """Turns the tokens of one text into pieces that, put together, are the text decoded at once.

    A token may hold part of a character, and some tokenizers write a token's space only where another stands before it.
    So each token is decoded together with those before it, back to the last place where a piece ended.

    Args:
        tokenizer: Decodes; special tokens are left out.
        stop: Strings at the first of which the text ends. No part of one is ever returned.
        before: Tokens that stand before the text and are no part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)
        self._context, self._read = 0, len(before)  # tokens from `context` to `read` are returned already
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take in a token, and return the text that is certain; sets `stopped` where a stop string is complete."""
        self._ids.append(token)
        new = self._unread()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """Return what was held back, since no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._unread())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _unread(self) -> str:
        before = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
