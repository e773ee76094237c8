"""Feedback records to token ids.

The ids of a row are those of its whole text, tokenized at once: of a conversation those of the chat template
(`apply_chat_template(prompt + answer)`), of plain strings those of `tokenizer(prompt + completion)`. They end with the
first token that ends the answer, or with EOS where none is written. The prompt is what generation starts from: its ids
are those of the prompt alone.

Few tokenizers join characters of the prompt and of the completion in one token, where the one ends and the other
begins. Since generation starts from the ids of the prompt alone, a completion is then tokenized as it stands in the
middle of a text (without the space that SentencePiece writes before a text), and prompt and completion put together
decode to the whole text, though not in the tokens of the whole.
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

from prlhf_lightning.data.rendering import RenderedRecord, Renderer, check_names, check_values, writes_date
from prlhf_lightning.data.schema import FeedbackRecord, Text, TieError
from prlhf_lightning.data.special_tokens import MARK, unescaped
from prlhf_lightning.data.template_coverage import Tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.utils.chat_tokens import end_token_ids

Overlong: TypeAlias = Literal["truncate", "drop", "error"]
# A completion is tokenized after one of these to get its ids in the middle of a text: the first that joins nothing.
_BEFORE = ("\n", ".", "x", "1")


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


_KINDS = {
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "max_user_text_length"), int),
    **{"overlong": str, "chat_template": bool, "user_text_format": str, "chat_template_args": dict},
}


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
        chat_template_args: Further arguments of the chat template, such as `{"enable_thinking": False}`.
        chat_template_date: The day, such as `2026-01-31`, that a chat template which writes today's date writes
            instead; None until the tokenizer is known (`dated`).
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
        """Return settings as a checkpoint or an exported folder keeps them, without those of later versions.

        Args:
            kept: The settings by name, and in `conversations` whether the training rows were conversations, in which
                case plain prompts are wrapped in the chat template too.
        """
        known = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
        if kept.get("conversations"):
            known["chat_template"] = True
        return cls(**known)

    def dated(self, tokenizer: PreTrainedTokenizerBase) -> TokenizationSettings:
        """Return settings with a date if the chat template writes one: today's, unless one is set.

        Everything that is made with them writes this date, on whatever day.
        """
        if self.chat_template_date is not None or not writes_date(tokenizer):
            return self
        return replace(self, chat_template_date=date.today().isoformat())

    def limit(self, part: str) -> tuple[str, int]:
        """Return the setting that limits a part of a record (a field of `TokenizedRecord`), and the limit."""
        setting = f"max_{part}_length" if part in ("prompt", "user_text") else "max_completion_length"
        return setting, getattr(self, setting)


@dataclass
class FeedbackTokenizer:
    """Tokenizes records in batches and keeps count of those over a limit.

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
        self._prefix = np.array(_prefix(self.tokenizer), dtype=np.int32)
        self._eos = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        self._ids = TextIds(self.tokenizer)

    def __call__(self, records: Sequence[FeedbackRecord], wheres: Sequence[str]) -> list[TokenizedRecord | None]:
        """Tokenize records that stand at `wheres`; None stands for a record dropped as overlong."""
        rendered = [self._render(record, where) for record, where in zip(records, wheres, strict=True)]
        self._ids.make_room()
        self._ids.learn(text for row in rendered for text in (row.user_text, row.prompt))
        completions = self._completions(rendered)
        return [
            self._fit(self._assemble(row, completions, where, record.fields), where, record.fields)
            for row, where, record in zip(rendered, wheres, records, strict=True)
        ]

    def prompts(self, prompts: Sequence[Text], tools: Tools = None, continued: bool = False) -> list[Ids]:
        """Tokenize prompts to be answered, as those of records are; of one over the limit the end is kept.

        Args:
            prompts: The prompts.
            tools: What may be called in answering any of them.
            continued: Whether the last message of each is the beginning of its answer.
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
        """Tokenize texts about users, as those of records are, whatever their length."""
        written = [self._render.user_text(text) for text in texts]
        self._ids.make_room()
        self._ids.learn(written)
        return [self._ids[text] for text in written]

    def forget(self) -> None:
        """Let go of all texts that are kept at hand."""
        self._ids.forget()

    def token_tie(self, ids: TokenizedRecord, where: str) -> TieError:
        """Return an error that says why completions that differ as texts have the same ids."""
        if int(ids.chosen[-1]) in self._ends:  # which a completion that was cut has lost
            how, mend = "have the same tokens in this tokenizer", "use a tokenizer that tells them apart, drop the row,"
        else:
            limit = self.settings.max_completion_length
            how, mend = f"are equal once truncated to {limit} tokens", f"raise max_completion_length (now {limit}),"
        return TieError(
            f"{where}: fields 'chosen' and 'rejected' {how}, so nothing is left that the user could prefer; "
            f"{mend} or set ties: drop to leave such rows out."
        )

    def _completions(self, rows: Sequence[RenderedRecord]) -> dict[tuple[str, str], Ids]:
        """Return the ids of the completions of rows, by the texts of prompt and completion, without an EOS added."""
        known = self._ids
        pairs = {(row.prompt, text) for row in rows for text in (row.chosen, row.rejected) if text}
        starts = self._starts({prompt for prompt, _ in pairs})
        known.learn(starts[prompt] + text for prompt, text in pairs)
        joint = {(prompt, text): _after(known[starts[prompt]], known[starts[prompt] + text]) for prompt, text in pairs}
        # An unknown word at the end of a prompt may have swallowed the start of the completion.
        unknown = self.tokenizer.unk_token_id
        swallows = {prompt for prompt, start in starts.items() if known[start][-1:].tolist() == [unknown]}
        unsure = {pair for pair, ids in joint.items() if ids is None or pair[0] in swallows}
        apart = self._apart({text for _, text in unsure}) if unsure else {}
        found: dict[tuple[str, str], Ids] = {}
        for pair, ids in joint.items():
            if pair in unsure and (ids is None or len(ids) < len(apart[pair[1]])):
                found[pair] = apart[pair[1]]
            elif ids is not None:
                found[pair] = ids
        return found

    def _starts(self, prompts: Iterable[str]) -> dict[str, str]:
        """Return for each prompt the end of it that its completions are tokenized with.

        Control tokens divide a text into parts that are tokenized each by itself, so the last part is enough.
        """
        known = self._ids
        if not self.tokenizer.is_fast:  # those in Python promise nothing of the kind
            return {prompt: prompt for prompt in prompts}
        last = {prompt: self._render.escaper.last(prompt) for prompt in prompts}
        ends = {prompt: prompt if match is None else prompt[match.start() :] for prompt, match in last.items()}
        known.learn(ends.values())
        return {
            prompt: end if np.array_equal(known[prompt][-len(known[end]) :], known[end]) else prompt
            for prompt, end in ends.items()
        }

    def _apart(self, texts: set[str]) -> dict[str, Ids]:
        """Return the ids that texts have in the middle of a text, joined with nothing before them."""
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
        """Put what the tokenizer adds in its places."""
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
                f"{where}: field 'prompt' has no tokens, and the tokenizer writes no BOS, so nothing stands before the "
                "completion; write a prompt."
            )
        return ids

    def _ended(self, ids: Ids, where: str, name: str) -> Ids:
        if not len(ids):
            raise FeedbackFormatError(f"{where}: field {name!r} has no token that the tokenizer knows; drop the row.")
        first = next((place for place, token in enumerate(ids.tolist()) if token in self._ends), None)
        if first is not None and not self.tokenizer.decode(ids[first:].tolist(), skip_special_tokens=True).strip():
            return ids[: first + 1]  # a row that is rendered already may hold several ends, one after another
        return ids if int(ids[-1]) in self._ends else np.concatenate([ids, self._eos])

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
    # Some tokenizers have a BOS token that they never write (Qwen), others append EOS too: ask, do not guess.
    return tokenizer.bos_token_id is not None and _prefix(tokenizer)[:1] == [tokenizer.bos_token_id]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer writes before a plain text: BOS most often, or none."""
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("x")["input_ids"])
    if not alone:  # a vocabulary of few words: what is left is added, and some add EOS too
        while whole and whole[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            whole.pop()
        return whole
    starts = [n for n in range(len(whole) - len(alone) + 1) if whole[n : n + len(alone)] == alone]
    return whole[: starts[0]] if starts else []


def _after(start: Ids, whole: Ids) -> Ids | None:
    """Return what follows `start` in `whole`, or None if nothing does or it does not begin so."""
    return whole[len(start) :] if len(whole) > len(start) and np.array_equal(whole[: len(start)], start) else None


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides the ids which a tokenizer gives, for keys of caches."""
    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "ends": end_token_ids(tokenizer),
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


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space at the start of a token
_DECODED_BEFORE = 8  # tokens; more than any character or word of which the last ones may be a part


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
    return prompt[-_DECODED_BEFORE:] if as_it_stands and first_space_is_lost else ()
