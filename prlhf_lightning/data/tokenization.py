"""Tokenization of feedback records.

The whole text of a row is tokenized at once: a conversation as `apply_chat_template(prompt + answer)`, plain strings as
`tokenizer(prompt + completion)`. The ids end with the first token that ends the answer; if there is none, EOS is added.
The prompt's ids are those of the prompt alone, because generation starts from them.

A few tokenizers merge characters across the boundary of prompt and completion into one token. Because generation starts
from the ids of the prompt alone, the completion is then tokenized as the middle of a text (without the space that
SentencePiece adds at the start of a text). Prompt and completion together decode to the whole text, but their tokens
differ from those of the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.records import FeedbackRecord, Text, TieError
from prlhf_lightning.data.rendering import RenderedRecord, Renderer, check_names, check_values, writes_date
from prlhf_lightning.data.special_tokens import MARK, unescaped
from prlhf_lightning.data.template_coverage import Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.chat_tokens import end_token_ids

Overlong: TypeAlias = Literal["truncate", "drop", "error"]
# Text before a completion, to get its ids in the middle of a text; the first one that no token merges with is used.
_BEFORE = ("\n", ".", "x", "1")


class TokenizedRecord(NamedTuple):
    """Token ids of one record, each field an int32 array."""

    user_text: Ids
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def tie(self) -> bool:
        """Whether there are two completions with equal ids."""
        return len(self.rejected) > 0 and np.array_equal(self.chosen, self.rejected)


_KINDS = {
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "max_user_text_length"), int),
    **{"overlong": str, "chat_template": bool, "user_text_format": str, "chat_template_args": dict},
}


@dataclass
class Excess:
    """Number of rows with a field over its limit, and the message of the first one."""

    count: int
    first: str


@dataclass(frozen=True)
class TokenizationSettings:
    """Tokenization settings.

    Attributes:
        max_prompt_length: Most tokens of a prompt; a longer one keeps its end (and BOS).
        max_completion_length: Most tokens of a completion, EOS included; a longer one keeps its start, without EOS.
        max_user_text_length: Most tokens of a user's text; a longer one keeps its start.
        overlong: Handling of a record over a limit.
        chat_template: Wrap plain strings as one turn of the chat template. Conversations always use it.
        user_text_format: Format of a user's text; `{user_text}` is replaced by the text.
        chat_template_args: Extra arguments of the chat template, such as `{"enable_thinking": False}`.
        chat_template_date: Date, such as `2026-01-31`, used instead of today's by chat templates that write a date;
            None until the tokenizer is known (see `dated`).
    """

    max_prompt_length: int = 512
    max_completion_length: int = 512
    max_user_text_length: int = 256
    overlong: Overlong = "truncate"
    chat_template: bool = False
    user_text_format: str = "{user_text}\n"
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    chat_template_date: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(
                    f"{name} is of type {type(getattr(self, name)).__name__}; give {kind.__name__}."
                )
        check_values(self.chat_template_args, self.chat_template_date)
        for name, least in (("max_prompt_length", 2), ("max_completion_length", 1), ("max_user_text_length", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.overlong not in get_args(Overlong):
            raise ConfigurationError(f"overlong is {self.overlong!r}; it must be one of {get_args(Overlong)}.")

    @classmethod
    def from_kept(cls, kept: Mapping[str, Any]) -> Self:
        """Restore settings saved in a checkpoint or exported folder; ignore settings of later versions.

        Args:
            kept: The settings by name. If `conversations` is true, the training rows were conversations, and plain
                prompts are wrapped in the chat template too.
        """
        known = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
        if kept.get("conversations"):
            known["chat_template"] = True
        return cls(**known)

    def dated(self, tokenizer: PreTrainedTokenizerBase) -> TokenizationSettings:
        """Return settings with a date if the chat template writes one: today's, unless a date is set.

        Later uses of the settings keep this date.
        """
        if self.chat_template_date is not None or not writes_date(tokenizer):
            return self
        return replace(self, chat_template_date=date.today().isoformat())

    def limit(self, part: str) -> tuple[str, int]:
        """Return the name and value of the length limit of a field of `TokenizedRecord`."""
        setting = f"max_{part}_length" if part in ("prompt", "user_text") else "max_completion_length"
        return setting, getattr(self, setting)


@dataclass
class FeedbackTokenizer:
    """Tokenizes records in batches and counts those over a limit.

    Attributes:
        tokenizer: The policy's tokenizer. It needs an EOS token, to end completions.
        settings: Limits and formats.
        excess: For each field, the records over its limit so far.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: TokenizationSettings
    excess: dict[str, Excess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError("The tokenizer has no EOS token to end completions with; set its eos_token.")
        self.settings = settings = self.settings.dated(self.tokenizer)
        check_names(settings.chat_template_args, self.tokenizer)
        self._render = Renderer(
            self.tokenizer,
            settings.chat_template,
            settings.user_text_format,
            settings.chat_template_args,
            settings.chat_template_date if writes_date(self.tokenizer) else None,
        )
        self._ends = frozenset(end_token_ids(self.tokenizer))
        self._prefix = np.array(prefix_ids(self.tokenizer), dtype=np.int32)
        self._eos = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        self._ids = TextIds(self.tokenizer)

    def __call__(self, records: Sequence[FeedbackRecord], wheres: Sequence[str]) -> list[TokenizedRecord | None]:
        """Tokenize records with locations `wheres`; None for a record dropped as overlong."""
        rendered = [self._render(record, where) for record, where in zip(records, wheres, strict=True)]
        self._ids.make_room()
        self._ids.learn(text for row in rendered for text in (row.user_text, row.prompt))
        completions = self._completions(rendered)
        return [
            self._fit(self._assemble(row, completions, where, record.fields), where, record.fields)
            for row, where, record in zip(rendered, wheres, records, strict=True)
        ]

    def prompts(self, prompts: Sequence[Text], tools: Tools = None, continued: bool = False) -> list[Ids]:
        """Tokenize prompts for generation, as in records; a prompt over the limit keeps its end.

        Args:
            prompts: The prompts.
            tools: Tool definitions for all prompts, or None.
            continued: Whether the last message of each prompt is the beginning of its answer.
        """
        wheres = [f"prompt {i}" for i in range(len(prompts))]
        rendered = [
            (*self._render.prompt(prompt, where, tools, continued), where)
            for prompt, where in zip(prompts, wheres, strict=True)
        ]
        self._ids.make_room()
        self._ids.learn(text for text, _, _ in rendered)
        limit = self.settings.max_prompt_length
        rows = [self._prompt(*row) for row in rendered]
        return [self._end(ids, limit) if len(ids) > limit else ids for ids in rows]

    def user_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenize texts about users, as in records, without truncation."""
        written = [self._render.user_text(text) for text in texts]
        self._ids.make_room()
        self._ids.learn(written)
        return [self._ids[text] for text in written]

    def forget(self) -> None:
        """Clear the cache of tokenized texts."""
        self._ids.forget()

    def token_tie(self, ids: TokenizedRecord, where: str) -> TieError:
        """Return an error that explains why two different completions have equal ids."""
        if int(ids.chosen[-1]) in self._ends:  # a truncated completion has no end token
            how, mend = "have the same tokens in this tokenizer", "use a tokenizer that tells them apart, drop the row,"
        else:
            limit = self.settings.max_completion_length
            how, mend = f"are equal once truncated to {limit} tokens", f"raise max_completion_length (now {limit}),"
        return TieError(
            f"and 'rejected' {how}, so nothing is left that the user could prefer",
            f"{mend} or set ties: drop to leave such rows out",
            field="chosen",
            where=where,
            kind="equals 'rejected' once tokenized and cut",
        )

    def _completions(self, rows: Sequence[RenderedRecord]) -> dict[tuple[str, str], Ids]:
        """Return the ids of the rows' completions, by the texts of prompt and completion, without an added EOS."""
        known = self._ids
        pairs = {(row.prompt, text) for row in rows for text in (row.chosen, row.rejected) if text}
        starts = self._starts({prompt for prompt, _ in pairs})
        known.learn(starts[prompt] + text for prompt, text in pairs)
        joint = {(prompt, text): _after(known[starts[prompt]], known[starts[prompt] + text]) for prompt, text in pairs}
        # An unknown word at the end of a prompt may include the start of the completion.
        unknown = self.tokenizer.unk_token_id
        ends_unknown = {prompt for prompt, start in starts.items() if known[start][-1:].tolist() == [unknown]}
        unsure = {pair for pair, ids in joint.items() if ids is None or pair[0] in ends_unknown}
        apart = self._apart({text for _, text in unsure}) if unsure else {}
        found: dict[tuple[str, str], Ids] = {}
        for pair, ids in joint.items():
            if pair in unsure and (ids is None or len(ids) < len(apart[pair[1]])):
                found[pair] = apart[pair[1]]
            elif ids is not None:
                found[pair] = ids
        return found

    def _starts(self, prompts: Iterable[str]) -> dict[str, str]:
        """Return for each prompt the suffix that is tokenized together with its completions.

        Control tokens split a text into parts that are tokenized independently, so the last part suffices.
        """
        known = self._ids
        if not self.tokenizer.is_fast:  # Python tokenizers do not guarantee this
            return {prompt: prompt for prompt in prompts}
        last = {prompt: self._render.escaper.last(prompt) for prompt in prompts}
        ends = {prompt: prompt if match is None else prompt[match.start() :] for prompt, match in last.items()}
        known.learn(ends.values())
        return {
            prompt: end if np.array_equal(known[prompt][-len(known[end]) :], known[end]) else prompt
            for prompt, end in ends.items()
        }

    def _apart(self, texts: set[str]) -> dict[str, Ids]:
        """Return the ids of texts in the middle of a text, not merged with anything before them."""
        known, found = self._ids, dict[str, Ids]()
        for before in _BEFORE:
            left = texts - found.keys()
            known.learn([before, *(before + text for text in left)])
            after = {text: _after(known[before], known[before + text]) for text in left}
            found |= {text: ids for text, ids in after.items() if ids is not None}
        known.learn(texts - found.keys())
        return {text: found[text] if text in found else known[text] for text in texts}

    def _assemble(
        self, row: RenderedRecord, completions: dict[tuple[str, str], Ids], where: str, fields: tuple[str, str]
    ) -> TokenizedRecord:
        """Assemble a record from its parts, with BOS and EOS added."""
        prompt = self._prompt(row.prompt, row.templated, where)
        chosen, rejected = (
            self._ids[""]
            if text is None
            else self._ended(completions.get((row.prompt, text), self._ids[""]), where, field)
            for text, field in zip((row.chosen, row.rejected), fields, strict=True)
        )
        return TokenizedRecord(self._ids[row.user_text], prompt, chosen, rejected)

    def _prompt(self, text: str, templated: bool, where: str) -> Ids:
        ids = self._ids[text]
        if not templated and not (len(ids) and ids[0] == self.tokenizer.bos_token_id):
            ids = np.concatenate([self._prefix, ids])
        if not len(ids):
            raise FeedbackFormatError(
                "has no tokens, and the tokenizer writes no BOS, so nothing stands before the completion",
                "write a prompt",
                field="prompt",
                where=where,
            )
        return ids

    def _ended(self, ids: Ids, where: str, name: str) -> Ids:
        if not len(ids):
            raise FeedbackFormatError("has no token that the tokenizer knows", "drop the row", field=name, where=where)
        first = next((place for place, token in enumerate(ids.tolist()) if token in self._ends), None)
        if first is not None and not self.tokenizer.decode(ids[first:].tolist(), skip_special_tokens=True).strip():
            return ids[: first + 1]  # a row that is already rendered may end in several end tokens
        return ids if int(ids[-1]) in self._ends else np.concatenate([ids, self._eos])

    def _fit(self, row: TokenizedRecord, where: str, fields: tuple[str, str]) -> TokenizedRecord | None:
        """Apply the length limits to a record as `settings.overlong` says; None for a dropped record."""
        settings = self.settings
        over: dict[str, Ids] = {}
        for name, field_name, ids in zip(row._fields, ("user_text", "prompt", *fields), row, strict=True):
            setting, limit = settings.limit(name)
            if len(ids) <= limit:
                continue
            problem = f"has {len(ids)} tokens, limit {limit}"
            if settings.overlong == "error":
                fix = f"raise {setting}, or set overlong to truncate or drop"
                raise FeedbackFormatError(problem, fix, field=field_name, where=where, kind=f"over {setting}={limit}")
            self.excess.setdefault(field_name, Excess(0, f"{where}: field {field_name!r} {problem}")).count += 1
            # The end of a prompt has the question; the start of an answer is its most important part.
            over[name] = self._end(ids, limit) if name == "prompt" else ids[:limit]
        if over and settings.overlong == "drop":
            return None
        return row._replace(**over)

    def _end(self, prompt: Ids, limit: int) -> Ids:
        head = prompt[: int(prompt[0] == self.tokenizer.bos_token_id)]
        return np.concatenate([head, prompt[len(head) - limit :]])


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer adds BOS to a plain text."""
    # Tested on a text, because some tokenizers have a BOS token but never add it (Qwen), and others add EOS too.
    return tokenizer.bos_token_id is not None and prefix_ids(tokenizer)[:1] == [tokenizer.bos_token_id]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer adds before a plain text: usually BOS, or none."""
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("x")["input_ids"])
    if not alone:  # "x" has no token in a small vocabulary: all ids are added ones; drop EOS
        while whole and whole[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            whole.pop()
        return whole
    starts = [n for n in range(len(whole) - len(alone) + 1) if whole[n : n + len(alone)] == alone]
    return whole[: starts[0]] if starts else []


def _after(start: Ids, whole: Ids) -> Ids | None:
    """Return the part of `whole` after `start`; None if it is empty or `whole` does not start with `start`."""
    return whole[len(start) :] if len(whole) > len(start) and np.array_equal(whole[: len(start)], start) else None


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in a tokenizer that affects ids, for cache keys."""
    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "ends": end_token_ids(tokenizer),
    }
    if tokenizer.is_fast:
        # Padding and truncation are state of the last call, not part of the tokenizer.
        content["backend"] = {
            name: value
            for name, value in json.loads(tokenizer.backend_tokenizer.to_str()).items()
            if name not in ("padding", "truncation")
        }
    else:
        content["vocabulary"] = tokenizer.get_vocab()
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


Ids: TypeAlias = npt.NDArray[np.int32]
_CACHE_BYTES = 40_000_000  # limit of the cache of tokenized texts with their ids
_ENTRY = 200  # overhead of an entry in bytes


class TextIds:
    """Cache of the token ids of texts, without added special tokens.

    Control tokens in a text become their ids, except those marked as text (`TokenEscaper`).

    Args:
        tokenizer: The tokenizer. Its padding and truncation have no effect here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Other code cannot change the padding or truncation of a copy, and its calls take half the time.
        self._backend = _copy(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        self.forget()

    def __len__(self) -> int:
        """Return the number of cached texts."""
        return len(self._ids)

    def __getitem__(self, text: str) -> Ids:
        """Return the ids of a text, `[L]` int32; `learn` must have cached it."""
        return self._ids[text]

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize and cache the texts that are not cached yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        marked = [text for text in new if MARK in text]
        self._keep(marked, self._encode_marked(marked) if marked else [])
        plain = [text for text in new if MARK not in text] if marked else new
        self._keep(plain, self._encode(plain) if plain else [])

    def make_room(self) -> None:
        """Clear the cache if it exceeds its memory limit."""
        if self._cached_bytes > _CACHE_BYTES:
            self.forget()

    def forget(self) -> None:
        """Clear the cache."""
        self._ids: dict[str, Ids] = {"": np.empty(0, dtype=np.int32)}
        self._cached_bytes = 0

    def _keep(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        for text, row in zip(texts, rows, strict=True):
            self._ids[text] = ids = np.array(row, dtype=np.int32)
            self._cached_bytes += len(text) + ids.nbytes + _ENTRY

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
        """A Rust tokenizer that finds added tokens first and then removes the marks.

        The mapping gives the original ids of the tokens that have other ids in this tokenizer.
        """
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["normalized"] = False  # otherwise the token would match again after the mark is removed
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
        """Return the ids for a Python tokenizer; text between control tokens is tokenized as plain text."""
        tokenizer = self._tokenizer
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, added)) + ")", text) if added else [text]:
            tokens = [piece] if piece in added else tokenizer.tokenize(unescaped(piece), split_special_tokens=True)
            ids += tokenizer.convert_tokens_to_ids(tokens)
        return ids


def _hide(tokens: Set[str], model: dict[str, Any]) -> None:
    """Hide tokens from a word-level, WordPiece or Unigram model; BPE only finds tokens that it merges."""
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


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a space at the start of a token
_DECODED_BEFORE = 8  # tokens; more than any character or word that the last tokens may be part of


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Decode tokens as the continuation of the tokens `before`, without special tokens.

    Spaces are as the model generated them; some tokenizers would remove those of " ." and " n't".
    """
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start = str(tokenizer.decode(list(before), **how)) if before else ""
    return str(tokenizer.decode([*before, *ids], **how))[len(start) :]


def loses_first_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether decoding loses a space at the start, as tokenizers converted from SentencePiece do."""
    token = next(
        (id_ for text, id_ in tokenizer.get_vocab().items() if text.startswith(_SPACE) and len(text) > 1), None
    )
    return token is not None and not decode(tokenizer, [token]).startswith(" ")


def read_on_from(prompt: Sequence[int], as_it_stands: bool, first_space_is_lost: bool) -> Sequence[int]:
    """Return the last tokens of a prompt if its answer must be decoded after them; otherwise none.

    Without a chat template, the answer continues the prompt's text, and its first token may start with a space. With a
    chat template, a space at the start belongs to the template and is dropped, as in transformers.

    Args:
        prompt: The prompt's tokens.
        as_it_stands: Whether the answer continues the prompt's text.
        first_space_is_lost: See `loses_first_space`.
    """
    return prompt[-_DECODED_BEFORE:] if as_it_stands and first_space_is_lost else ()
