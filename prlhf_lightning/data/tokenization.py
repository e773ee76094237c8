"""Feedback records to token ids.

A plain prompt becomes `[BOS] prompt` (BOS where the tokenizer writes one by itself) and a plain completion
`completion EOS`. A conversation becomes the chat template's text up to the assistant's turn, and what the template adds
for the answer, ended by EOS. Prompt and completion are tokenised apart, so that the ids of a prompt do not depend on
what follows it, in training as in generation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.records import FeedbackRecord, Text, TieError
from prlhf_lightning.data.rendering import RenderedRecord, Renderer
from prlhf_lightning.data.template_coverage import Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

Ids: TypeAlias = npt.NDArray[np.int32]
Overlong: TypeAlias = Literal["truncate", "drop", "error"]
_REMEMBERED = 40_000_000  # bytes of texts already tokenised that are kept at hand, with their ids
_ENTRY = 200  # bytes of one of them beside its characters and ids


class TokenizedRecord(NamedTuple):
    """Token ids of one record, each field an int32 array."""

    user_text: Ids
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def tie(self) -> bool:
        """Whether there are two completions and both have the same ids."""
        return len(self.rejected) > 0 and np.array_equal(self.chosen, self.rejected)


@dataclass
class Excess:
    """How often a field was longer than its limit, and the first place where."""

    count: int
    first: str


@dataclass(frozen=True)
class TokenizationSettings:
    """How text becomes ids.

    Attributes:
        max_prompt_length: Most tokens of a prompt; a longer one keeps its end (and BOS).
        max_completion_length: Most tokens of a completion, EOS included; a longer one keeps its start, without EOS.
        max_user_text_length: Most tokens of a user's text; a longer one keeps its start.
        overlong: What is done with a record over a limit.
        chat_template: Whether plain strings are wrapped as one turn of the chat template. Conversations always are.
        user_text_format: How a user's text is written; `{user_text}` stands for it.
    """

    max_prompt_length: int = 512
    max_completion_length: int = 512
    max_user_text_length: int = 256
    overlong: Overlong = "truncate"
    chat_template: bool = False
    user_text_format: str = "{user_text}\n"

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_length", 2), ("max_completion_length", 1), ("max_user_text_length", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.overlong not in get_args(Overlong):
            raise ConfigurationError(f"overlong is {self.overlong!r}; it must be one of {get_args(Overlong)}.")

    @classmethod
    def from_kept(cls, kept: Mapping[str, Any]) -> Self:
        """Return settings as a checkpoint or an exported folder keeps them, without those of later versions.

        Args:
            kept: The settings by name, and in `conversations` whether the training rows were conversations, in which
                case plain prompts are wrapped in the chat template too.
        """
        known = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
        if kept.get("conversations"):
            known["chat_template"] = True
        return cls(**known)

    def limit(self, part: str) -> tuple[str, int]:
        """Return the setting that limits a part of a record (a field of `TokenizedRecord`), and the limit."""
        setting = f"max_{part}_length" if part in ("prompt", "user_text") else "max_completion_length"
        return setting, getattr(self, setting)


@dataclass
class FeedbackTokenizer:
    """Tokenises records in batches and keeps count of those over a limit.

    Attributes:
        tokenizer: The policy's tokenizer. It needs an EOS token, to end completions with.
        settings: Limits and formats.
        excess: For each field, the records that were over its limit so far.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: TokenizationSettings
    excess: dict[str, Excess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError("The tokenizer has no EOS token to end completions with; set its eos_token.")
        self._render = Renderer(self.tokenizer, self.settings.chat_template, self.settings.user_text_format)
        bos = [self.tokenizer.bos_token_id] if writes_bos(self.tokenizer) else []
        self._bos = np.array(bos, dtype=np.int32)
        self._eos = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        self._backend = _private_backend(self.tokenizer)
        self._ids: dict[str, Ids] = {"": self._eos[:0]}
        self._remembered = 0

    def __call__(self, records: Sequence[FeedbackRecord], wheres: Sequence[str]) -> list[TokenizedRecord | None]:
        """Tokenise records that stand at `wheres`; None stands for a record dropped as overlong."""
        rendered = [self._render(record, where) for record, where in zip(records, wheres, strict=True)]
        texts = ((row.user_text, row.prompt, row.chosen or "", row.rejected or "") for row in rendered)
        self._learn({text for row in texts for text in row})
        return [
            self._fit(self._assemble(row, where, record.fields), where, record.fields)
            for row, where, record in zip(rendered, wheres, records, strict=True)
        ]

    def prompts(self, prompts: Sequence[Text], tools: Tools = None) -> list[Ids]:
        """Tokenise prompts to be answered, as those of records are; of one over the limit the end is kept.

        Args:
            prompts: The prompts.
            tools: What may be called in answering any of them.
        """
        wheres = [f"prompt {i}" for i in range(len(prompts))]
        rendered = [
            (*self._render.prompt(prompt, where, tools), where) for prompt, where in zip(prompts, wheres, strict=True)
        ]
        self._learn({text for text, _, _ in rendered})
        limit = self.settings.max_prompt_length
        rows = [self._prompt(*row) for row in rendered]
        return [self._end(ids, limit) if len(ids) > limit else ids for ids in rows]

    def user_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise texts about users, as those of records are, whatever their length."""
        written = [self._render.user_text(text) for text in texts]
        self._learn(set(written))
        return [self._ids[text] for text in written]

    def forget(self) -> None:
        """Let go of all texts that are kept at hand."""
        self._ids, self._remembered = {"": self._eos[:0]}, 0

    def token_tie(self, ids: TokenizedRecord, where: str) -> TieError:
        """Return an error that says why completions that differ as texts have the same ids."""
        if ids.chosen[-1] == self.tokenizer.eos_token_id:  # which a completion that was cut has lost
            how, mend = "have the same tokens in this tokenizer", "use a tokenizer that tells them apart, drop the row,"
        else:
            limit = self.settings.max_completion_length
            how, mend = f"are equal once truncated to {limit} tokens", f"raise max_completion_length (now {limit}),"
        return TieError(
            f"{where}: fields 'chosen' and 'rejected' {how}, so nothing is left that the user could prefer; "
            f"{mend} or set ties: drop to leave such rows out."
        )

    def _learn(self, texts: set[str]) -> None:
        """Tokenise the texts not yet known; crowds judge the same texts many times over."""
        if self._remembered > _REMEMBERED:
            self.forget()
        new = [text for text in texts if text not in self._ids]
        if not new:
            return
        if self._backend is not None:
            rows = [encoding.ids for encoding in self._backend.encode_batch_fast(new, add_special_tokens=False)]
        else:
            rows = self.tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
        for text, row in zip(new, rows, strict=True):
            self._ids[text] = ids = np.array(row, dtype=np.int32)
            self._remembered += len(text) + ids.nbytes + _ENTRY

    def _assemble(self, row: RenderedRecord, where: str, fields: tuple[str, str]) -> TokenizedRecord:
        """Put BOS and EOS in their places."""
        prompt = self._prompt(row.prompt, row.templated, where)
        chosen, rejected = (
            self._ids[""] if text is None else self._completion(text, where, field)
            for text, field in zip((row.chosen, row.rejected), fields, strict=True)
        )
        return TokenizedRecord(self._ids[row.user_text], prompt, chosen, rejected)

    def _prompt(self, text: str, templated: bool, where: str) -> Ids:
        ids = self._ids[text] if templated else np.concatenate([self._bos, self._ids[text]])
        if not len(ids):
            raise FeedbackFormatError(
                f"{where}: field 'prompt' has no tokens, and the tokenizer writes no BOS, so nothing stands before the "
                "completion; write a prompt."
            )
        return ids

    def _completion(self, text: str, where: str, name: str) -> Ids:
        ids = self._ids[text]
        if not len(ids):
            raise FeedbackFormatError(f"{where}: field {name!r} has no token that the tokenizer knows; drop the row.")
        return ids if ids[-1] == self._eos[0] else np.concatenate([ids, self._eos])

    def _fit(self, row: TokenizedRecord, where: str, fields: tuple[str, str]) -> TokenizedRecord | None:
        """Hold a record to the limits as `settings.overlong` says."""
        settings = self.settings
        over: dict[str, Ids] = {}
        for name, field_name, ids in zip(row._fields, ("user_text", "prompt", *fields), row, strict=True):
            setting, limit = settings.limit(name)
            if len(ids) <= limit:
                continue
            message = f"{where}: field {field_name!r} has {len(ids)} tokens, limit {limit}"
            if settings.overlong == "error":
                raise FeedbackFormatError(f"{message}; raise {setting}, or set overlong to truncate or drop.")
            self.excess.setdefault(field_name, Excess(0, message)).count += 1
            # The end of a prompt holds the question, the start of an answer what it is about.
            over[name] = self._end(ids, limit) if name == "prompt" else ids[:limit]
        if over and settings.overlong == "drop":
            return None
        return row._replace(**over)

    def _end(self, prompt: Ids, limit: int) -> Ids:
        head = prompt[: int(prompt[0] == self.tokenizer.bos_token_id)]
        return np.concatenate([head, prompt[len(head) - limit :]])


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer begins a plain text with BOS."""
    bos = tokenizer.bos_token_id
    # Some tokenizers have a BOS token that they never write (Qwen), others append EOS too: ask, do not guess.
    return bos is not None and tokenizer("x")["input_ids"][:1] == [bos]


def _private_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Copy the Rust tokenizer: nobody else's padding or truncation can reach the copy, and calls are half as costly."""
    if not tokenizer.is_fast:
        return None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides the ids which a tokenizer gives, for keys of caches."""
    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        # Padding and truncation are the last caller's, not the tokenizer's.
        content["backend"] = {
            name: value
            for name, value in json.loads(tokenizer.backend_tokenizer.to_str()).items()
            if name not in ("padding", "truncation")
        }
    else:
        content["vocabulary"] = tokenizer.get_vocab()
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
