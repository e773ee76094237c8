"""Texts to token ids, each text once: crowds judge the same texts many times over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.escaped_tokens import MARK, unescaped

Ids: TypeAlias = npt.NDArray[np.int32]
_REMEMBERED = 40_000_000  # bytes of texts already tokenized that are kept at hand, with their ids
_ENTRY = 200  # bytes of one of them beside its characters and ids


class TextIds:
    """Token ids of texts, as the tokenizer gives them without the special tokens that it adds by itself.

    Control tokens in a text become their ids, but for those that are marked as text (`TokenEscaper`).

    Args:
        tokenizer: The tokenizer. Its padding and truncation have no effect here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Nobody else's padding or truncation can reach a copy, and its calls are half as costly.
        self._backend = _copy(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        self.forget()

    def __len__(self) -> int:
        """Return the number of texts that are known."""
        return len(self._ids)

    def __getitem__(self, text: str) -> Ids:
        """Return the ids of a text, `[L]` int32; `learn` must have been called with it since texts were forgotten."""
        return self._ids[text]

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize the texts that are not yet known."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        marked = [text for text in new if MARK in text]
        self._keep(marked, self._encode_marked(marked) if marked else [])
        plain = [text for text in new if MARK not in text] if marked else new
        self._keep(plain, self._encode(plain) if plain else [])

    def make_room(self) -> None:
        """Forget all texts if they take too much memory."""
        if self._remembered > _REMEMBERED:
            self.forget()

    def forget(self) -> None:
        """Forget all texts."""
        self._ids: dict[str, Ids] = {"": np.empty(0, dtype=np.int32)}
        self._remembered = 0

    def _keep(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        for text, row in zip(texts, rows, strict=True):
            self._ids[text] = ids = np.array(row, dtype=np.int32)
            self._remembered += len(text) + ids.nbytes + _ENTRY

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        rows: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return rows

    def _encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return [self._encode_marked_slowly(text) for text in texts]
        backend, ids = self._backend_for_marked
        rows = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[ids.get(number, number) for number in row.ids] for row in rows]

    @cached_property
    def _backend_for_marked(self) -> tuple[Tokenizer, dict[int, int]]:
        """The Rust tokenizer that finds added tokens first and takes out the marks after that.

        The mapping gives the ids of those tokens whose ids differ in it.
        """
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["normalized"] = False  # or the token would be looked for again where the mark was
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        _hide(added.keys() - {content["model"].get("unk_token")}, content["model"])
        steps = [{"type": "Replace", "pattern": {"String": MARK}, "content": ""}]
        if content["normalizer"] is not None:
            steps.append(content["normalizer"])
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        backend = _copy(json.dumps(content))
        found = {backend.token_to_id(token): number for token, number in added.items()}
        return backend, {other: number for other, number in found.items() if other is not None}

    def _encode_marked_slowly(self, text: str) -> list[int]:
        """Return the ids for a tokenizer in Python: what stands between control tokens is tokenized as text only."""
        tokenizer = self._tokenizer
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, added)) + ")", text) if added else [text]:
            tokens = [piece] if piece in added else tokenizer.tokenize(unescaped(piece), split_special_tokens=True)
            ids += tokenizer.convert_tokens_to_ids(tokens)
        return ids


def _hide(tokens: Set[str], model: dict[str, Any]) -> None:
    """Have a model of whole words or pieces not find some tokens in a text; BPE finds none that it does not merge."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces and scores
        model["vocab"] = [[MARK + piece if piece in tokens else piece, score] for piece, score in vocabulary]
    elif "merges" not in model:
        model["vocab"] = {MARK + piece if piece in tokens else piece: number for piece, number in vocabulary.items()}


def _copy(content: str) -> Tokenizer:
    backend = Tokenizer.from_str(content)
    backend.no_padding()
    backend.no_truncation()
    return backend
