"""Continuous batching: at every step new texts join the batch and finished ones leave it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference.requests import Chunk, FinishReason, GenerationRequest

if TYPE_CHECKING:
    from prlhf_lightning.inference.generator import Generator, PreparedRequest
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.tokenization import decode


@dataclass
class _Text:
    """A running or waiting text."""

    number: int
    prepared: PreparedRequest
    stream: TextStream
    chance: torch.Generator
    written: int = 0
    last: int = field(default=-1)

    @property
    def rows(self) -> int:
        return len(self.prepared.conditions)

    @property
    def length(self) -> int:
        """Number of positions of its longest row at the end."""
        vectors = max(len(condition.vectors) for condition in self.prepared.conditions)
        return vectors + len(self.prepared.prompt) + self.prepared.max_new_tokens


class Engine:
    """Generates with iteration-level (continuous) batching, as in Orca (Yu et al. 2022).

    Each step generates one token for every running text. A text takes one row of the batch per condition: one at
    strengths 0 and 1, two at others. Requests that follow one another and differ only in their seed share the
    computation of their prompt. Apart from float rounding, texts do not depend on the rest of the batch. For a model
    with states other than keys and values (such as Mamba), rows are computed one by one. Not thread-safe. If `step`
    fails, for example out of memory, running texts are lost: create a new engine.

    Args:
        writer: The model.
        max_batch_rows: Maximum number of rows in a step; further texts wait.
        max_batch_tokens: Maximum number of cached positions: rows times the longest row, since a long text pads all
            other rows. A text that needs more is generated alone. None for no limit.
    """

    def __init__(self, writer: Generator, max_batch_rows: int = 64, max_batch_tokens: int | None = None) -> None:
        if max_batch_rows < 1:
            raise ConfigurationError(f"max_batch_rows is {max_batch_rows}; it must be 1 or more.")
        self._writer = writer
        self._max_batch_rows, self._max_batch_tokens = max_batch_rows, max_batch_tokens or math.inf
        self._rows = writer.new_rows()
        self._waiting: deque[_Text] = deque()
        self._running: list[_Text] = []  # in row order
        self._next = 0

    def add(self, generation: GenerationRequest) -> int:
        """Add a request to the queue and return the number of its chunks.

        Raises:
            ConfigurationError: It is too long for the model, takes too many rows, or has a user text that nothing
                reads.
            FeedbackFormatError: Its prompt is empty, or does not fit the chat template.
        """
        prepared = self._writer.prepare(generation)
        if len(prepared.conditions) > self._max_batch_rows:
            raise ConfigurationError(
                f"This generation takes {len(prepared.conditions)} rows, more than max_batch_rows "
                f"({self._max_batch_rows}); raise that, or use a strength of 0 or 1."
            )
        chance = torch.Generator()
        if generation.seed is None:
            chance.seed()
        else:
            chance.manual_seed(generation.seed)
        number, self._next = self._next, self._next + 1
        stream = TextStream(self._writer.tokenizer, generation.stop, self._writer.read_on_from(prepared))
        self._waiting.append(_Text(number, prepared, stream, chance))
        return number

    def cancel(self, number: int) -> None:
        """Stop a request; a finished or unknown number is ignored."""
        self._waiting = deque(text for text in self._waiting if text.number != number)
        self._keep([text for text in self._running if text.number != number])

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self._running)

    @torch.no_grad()
    def step(self) -> list[Chunk]:
        """Admit waiting requests that fit, and generate one token for each running one.

        Returns:
            A chunk for each of them; empty if nothing runs.
        """
        logits = []
        new = self._admit()
        if self._running:
            last = [text.last for text in self._running for _ in range(text.rows)]
            logits.append(self._rows.advance(torch.tensor(last, device=self._writer.lm.device)))
        if new:
            prompts, rows = _distinct(new)
            logits.append(self._rows.append(self._writer.sequences(prompts), rows))
            self._running += new
        if not logits:
            return []
        tokens = self._choose(self._mixed(torch.cat(logits)))
        pieces = [self._piece(text, token) for text, token in zip(self._running, tokens, strict=True)]
        going = {piece.number for piece in pieces if piece.finish_reason is None}
        self._keep([text for text in self._running if text.number in going])
        return pieces

    def _admit(self) -> list[_Text]:
        """Take requests from the queue, in order, while they fit."""
        rows, longest = len(self._rows), max((text.length for text in self._running), default=0)
        new: list[_Text] = []
        while self._waiting:
            text = self._waiting[0]
            alone, rows, longest = not rows, rows + text.rows, max(longest, text.length)
            if rows > self._max_batch_rows or (rows * longest > self._max_batch_tokens and not alone):
                break
            new.append(self._waiting.popleft())
        return new

    def _mixed(self, logits: Tensor) -> Tensor:
        """Return the weighted sums `[B, V]` of the logits `[R, V]` of each text's rows."""
        weights = [condition.weight for text in self._running for condition in text.prepared.conditions]
        owners = [place for place, text in enumerate(self._running) for _ in range(text.rows)]
        if len(weights) == len(self._running):  # one row each, of weight 1
            return logits
        mixed = logits.new_zeros(len(self._running), logits.shape[1])
        owner = torch.tensor(owners, device=logits.device)
        return mixed.index_add_(0, owner, logits * logits.new_tensor(weights)[:, None])

    def _choose(self, logits: Tensor) -> list[int]:
        asked = [text.prepared.generation for text in self._running]
        if len(self._writer.unused_ids):
            logits = logits.index_fill(1, self._writer.unused_ids, -torch.inf)
        if logits.device.type == "mps":  # which has no float64
            logits = logits.cpu()
        # One number per step from each text's own generator, so that sampling does not depend on the rest of the batch.
        draws = [
            torch.rand((), generator=text.chance, dtype=torch.float64).item() if generation.temperature > 0 else 0.0
            for text, generation in zip(self._running, asked, strict=True)
        ]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=logits.device)

        temperatures = column([generation.temperature for generation in asked])
        top_ps = column([generation.top_p for generation in asked])
        return sample_tokens(logits, temperatures, top_ps, column(draws)).tolist()

    def _piece(self, text: _Text, token: int) -> Chunk:
        prepared = text.prepared
        text.last, text.written = token, text.written + 1
        ended = token in self._writer.end_token_ids
        shown = "" if ended else text.stream.push(token)
        reason: FinishReason | None = None
        if ended or text.stream.stopped:
            reason = "stop"
        elif text.written == prepared.max_new_tokens:
            reason = "length"
        if reason and not text.stream.stopped:
            shown += text.stream.finish()
            reason = "stop" if text.stream.stopped else reason
        return Chunk(text.number, shown, 1, reason, (token,), prepared.prompt_tokens, prepared.known_user)

    def _keep(self, texts: list[_Text]) -> None:
        if len(texts) == len(self._running):
            return
        kept = {text.number for text in texts}
        owners = [text.number for text in self._running for _ in range(text.rows)]
        self._rows.keep(row for row, owner in enumerate(owners) if owner in kept)
        self._running = texts


def _distinct(texts: Sequence[_Text]) -> tuple[list[PreparedRequest], list[int]]:
    """Return the prompts of texts, once where neighbors differ only in their seed, and the sequence of each row."""
    prompts: list[PreparedRequest] = []
    rows: list[int] = []
    first = 0  # the first sequence of the last prompt
    for text in texts:
        asked = replace(text.prepared.generation, seed=None)
        if not prompts or asked != replace(prompts[-1].generation, seed=None):
            first += len(prompts[-1].conditions) if prompts else 0
            prompts.append(text.prepared)
        rows += range(first, first + text.rows)
    return prompts, rows


def sample_tokens(logits: Tensor, temperatures: Tensor, top_ps: Tensor, chances: Tensor) -> Tensor:
    """Return the next token of each text, `[B]` int64.

    Args:
        logits: `[B, V]`.
        temperatures: `[B]`; 0 is greedy, with the first of equally likely tokens.
        top_ps: `[B]` probability mass to sample from, of the smallest set of likeliest tokens (nucleus sampling,
            Holtzman et al. 2020).
        chances: `[B]` float64 in [0, 1), one draw for each text.
    """
    tokens = logits.argmax(-1)
    sampled = (temperatures > 0).nonzero()[:, 0]
    if not len(sampled):
        return tokens
    wanted = logits[sampled].double()
    scaled = (wanted - wanted.amax(-1, keepdim=True)) / temperatures[sampled, None].double()
    # In float64: the rounding of a float32 sum over a large vocabulary would change samples.
    probs, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    below = probs.cumsum(-1) - probs
    kept = (below < top_ps[sampled, None].double()) * probs
    reached = kept.cumsum(-1)
    target = chances[sampled, None] * reached[:, -1:]
    places = torch.searchsorted(reached, target, right=True)
    # At least the first, so that a text with NaN logits does not fail the batch.
    last = ((kept > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    tokens[sampled] = order.gather(-1, torch.minimum(places, last))[:, 0]
    return tokens


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded form of an incomplete character


class TextStream:
    """Decodes the tokens of one text incrementally; the pieces add up to the text decoded at once.

    A token may hold part of a character, and some tokenizers write a token's space only after another token. So each
    token is decoded together with those before it, back to the last end of a piece.

    Args:
        tokenizer: Decodes tokens; special tokens are left out.
        stop: Strings that end the text. No part of one is ever returned.
        before: Tokens before the text, which are not part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)
        self._context, self._read = 0, len(before)  # tokens from `context` to `read` are already returned
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is final; sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        new = self._unread()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """Return the remaining text after the last token."""
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
    """Return the length of the longest suffix of a text that is a prefix of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
