"""The generator: a trained model that writes for its users."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings, loses_first_space, read_on_from
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError, PromptTooLongError
from prlhf_lightning.inference.engine import Engine
from prlhf_lightning.inference.folder import read_folder
from prlhf_lightning.inference.guidance import Condition, conditions, knows
from prlhf_lightning.inference.kv_cache import make_kv_cache
from prlhf_lightning.inference.requests import Chunk, Completion, FinishReason, GenerationRequest
from prlhf_lightning.policies.generation_settings import warn_of_not_applied
from prlhf_lightning.policies.loading import unused_ids
from prlhf_lightning.policies.scoring import segments
from prlhf_lightning.policies.sequences import join
from prlhf_lightning.types import SoftPrompt, Tokens
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.utils.chat_tokens import end_token_ids

_NO_LIMIT = 2**31  # tokens; longer prompts are refused, not truncated


@dataclass(frozen=True)
class PreparedRequest:
    """A validated and tokenized request.

    Attributes:
        generation: What is asked.
        prompt: Its tokens, with BOS if the tokenizer writes one.
        conditions: Its weighted soft prompts.
        max_new_tokens: The requested number, limited by the model's positions.
        prompt_tokens: Tokens of the prompt and of the user's text.
        known_user: Whether the model knows every named user.
    """

    generation: GenerationRequest
    prompt: list[int]
    conditions: tuple[Condition, ...]
    max_new_tokens: int
    prompt_tokens: int
    known_user: bool


class Generator:
    """Generates text with a policy conditioned on users.

    Attributes:
        lm: The Hugging Face model, adapters included, in evaluation mode.
        tokenizer: Its tokenizer.
        user_model: Maps users to soft prompts.
        vocabulary: The users with a row in the user model.
        name: Name of the model.
        tokenization: Tokenization settings of prompts and users' texts; length limits are not applied.
        end_token_ids: The end tokens of the tokenizer, its chat template and the model's generation config. Nothing
            else of that config is applied.

    Args:
        lm: As above.
        tokenizer: As above.
        user_model: As above, built and trained.
        vocabulary: As above.
        name: As above.
        tokenization: As above.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        user_model: UserModel,
        vocabulary: UserVocabulary,
        name: str = "prlhf_lightning",
        tokenization: TokenizationSettings | None = None,
    ) -> None:
        self.lm = lm.eval()
        self.new_rows = make_kv_cache(self.lm)
        self._loses_first_space = loses_first_space(tokenizer)
        self.tokenizer = tokenizer
        self.user_model = user_model.eval().to(lm.device)
        self.vocabulary = vocabulary
        self.name = name
        generation_config = getattr(lm, "generation_config", None)
        self.end_token_ids = frozenset(end_token_ids(tokenizer, generation_config))
        warn_of_not_applied(generation_config, name)
        unlimited = {"max_prompt_length": _NO_LIMIT, "max_user_text_length": _NO_LIMIT}
        self.tokenization = replace(tokenization or TokenizationSettings(), **unlimited)  # type: ignore[arg-type]
        self._encoders = {self.tokenization.chat_template: FeedbackTokenizer(tokenizer, self.tokenization)}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        trust_classes: Collection[str] | None = None,
    ) -> Self:
        """Return a generator from an exported folder.

        Args:
            folder: The exported folder.
            device: Device of the model.
            trust_remote_code: Run code that comes with the language model. Only for sources that you trust.
            trust_classes: Dotted paths of user models outside this package that the folder may name; they are imported.
                Classes that are already imported need not be listed.

        Raises:
            ConfigurationError: The folder is incomplete, names other classes, or cannot be read by this version.
        """
        content = read_folder(Path(folder), trust_remote_code, trust_classes)
        lm = content.lm.to(device)
        return cls(lm, content.tokenizer, content.user_model, content.vocabulary, content.name, content.tokenization)

    @cached_property
    def max_positions(self) -> int | None:
        """Maximum number of vectors and tokens of a sequence; None for no limit."""
        limit: int | None = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        return limit

    @cached_property
    def unused_ids(self) -> Tensor:
        """`[n]` output ids of the model without a token in the tokenizer, as in padded vocabularies."""
        return torch.tensor(unused_ids(self.tokenizer, self.lm), dtype=torch.long, device=self.lm.device)

    def generate(
        self, generations: Sequence[GenerationRequest], progress: bool = False, max_batch_rows: int = 64
    ) -> list[Completion]:
        """Return the completions of all requests; each is the same as if generated alone.

        Args:
            generations: What is asked.
            progress: Show a progress bar.
            max_batch_rows: Maximum number of rows in a step.

        Raises:
            ConfigurationError: One of them is invalid; then nothing is generated.
        """
        for generation in generations:  # before anything is computed
            self.prepare(generation)
        found: dict[int, Completion] = {}
        with Progress(disable=not progress) as bar:
            for place, completion in bar.track(
                self.as_finished(generations, max_batch_rows), len(generations), description="Writing"
            ):
                found[place] = completion
        return [found[place] for place in range(len(generations))]

    def as_finished(
        self, generations: Iterable[GenerationRequest], max_batch_rows: int = 64
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number and the completion of each request as soon as it is finished.

        Args:
            generations: What is asked; read only as far as the batch needs.
            max_batch_rows: Maximum number of rows in a step.

        Raises:
            ConfigurationError: One of them is invalid; earlier ones may have been generated.
        """
        engine = Engine(self, max_batch_rows)
        left = enumerate(generations)
        upcoming = next(left, None)
        places: dict[int, int] = {}
        pieces: dict[int, list[Chunk]] = defaultdict(list)
        while upcoming or not engine.idle:
            while upcoming and engine.waiting < max_batch_rows:  # not all: that holds their vectors
                place, generation = upcoming
                places[engine.add(generation)] = place
                upcoming = next(left, None)
            for piece in engine.step():
                pieces[piece.number].append(piece)
                if piece.finish_reason is not None:
                    yield places.pop(piece.number), _completion(pieces.pop(piece.number))

    def stream(self, generation: GenerationRequest) -> Iterator[Chunk]:
        """Yield the chunks of one request as they are generated; the last has a `finish_reason`."""
        engine = Engine(self)
        engine.add(generation)
        while not engine.idle:
            yield from engine.step()

    @torch.no_grad()
    def prepare(self, generation: GenerationRequest) -> PreparedRequest:
        """Return a request with its tokens and its users' conditions.

        Raises:
            PromptTooLongError: The prompt leaves no position for an answer.
            ConfigurationError: It has a user text, but the user model reads none.
            FeedbackFormatError: The prompt is empty, ends with an answer, or does not fit the chat template.
        """
        _check_last_message(generation)
        encode = self._encoder(generation.chat_template)
        prompt = encode.prompts([generation.prompt], generation.tools, generation.continue_final_message)[0].tolist()
        text, text_tokens = None, 0
        if generation.user_text:
            if not self.user_model.uses_text:
                problem = f"this model's {type(self.user_model).__name__} reads no text about users"
                raise ConfigurationError(problem, "leave it out", field="user_text")
            ids = encode.user_texts([generation.user_text])[0].tolist()
            text_tokens = len(ids)
            text = segments(self.lm, None, self._tokens([ids]), None)[0]
        encode.forget()  # do not keep users' text in memory
        found = tuple(conditions(generation, self.user_model, self.vocabulary, text, self.lm.device))
        known = knows(self.vocabulary, generation.user)
        length = len(prompt) + max(len(condition.vectors) for condition in found)
        room = generation.max_new_tokens if self.max_positions is None else self.max_positions - length
        if room < 1:
            raise PromptTooLongError(
                f"prompt: soft prompt, user text and prompt take {length} positions, and this model has "
                f"{self.max_positions}, and the answer needs at least one; shorten the prompt."
            )
        limit = min(room, generation.max_new_tokens)
        return PreparedRequest(generation, prompt, found, limit, len(prompt) + text_tokens, known)

    def read_on_from(self, prepared: PreparedRequest) -> Sequence[int]:
        """Return the prompt tokens after which its answer must be decoded; see `decoding.read_on_from`."""
        generation = prepared.generation
        goes_on = generation.continue_final_message or self.takes_as_it_stands(generation)
        return read_on_from(prepared.prompt, goes_on, self._loses_first_space)

    def takes_as_it_stands(self, generation: GenerationRequest) -> bool:
        """Return whether a request's prompt is a string outside the chat template."""
        wrapped = self.tokenization.chat_template if generation.chat_template is None else generation.chat_template
        return isinstance(generation.prompt, str) and not wrapped

    def _encoder(self, chat_template: bool | None) -> FeedbackTokenizer:
        """Return the tokenizer of prompts, with the chat template for plain ones or not; None for as in training."""
        wrapped = self.tokenization.chat_template if chat_template is None else chat_template
        if wrapped not in self._encoders:
            settings = replace(self.tokenization, chat_template=wrapped)
            self._encoders[wrapped] = FeedbackTokenizer(self.tokenizer, settings)
        return self._encoders[wrapped]

    @torch.no_grad()
    def sequences(self, generations: Sequence[PreparedRequest]) -> SoftPrompt:
        """Return the prompts with soft prompts, one row per condition, `[R, L, d]`, padded at the start."""
        rows = [(one.prompt, condition.vectors) for one in generations for condition in one.conditions]
        width = max(len(vectors) for _, vectors in rows)
        soft_prompt = SoftPrompt(
            torch.stack([_padded(vectors, width) for _, vectors in rows]),
            torch.stack([torch.arange(width, device=self.lm.device) < len(vectors) for _, vectors in rows]),
        )
        prompt = self._tokens([prompt for prompt, _ in rows])
        return join(segments(self.lm, self.tokenizer.bos_token_id, prompt, soft_prompt), align="right")

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tokens:
        return Tokens.from_lists(rows).to(self.lm.device)


def _check_last_message(generation: GenerationRequest) -> None:
    prompt = generation.prompt
    if prompt == []:
        raise FeedbackFormatError("is a conversation without a message", "give it one of the user", field="prompt")
    ends_with_answer = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
    if ends_with_answer and not generation.continue_final_message:
        raise FeedbackFormatError(
            "ends with a message of the assistant, which needs no answer",
            "end with a message of the user, or set continue_final_message to true to continue it",
            field="prompt",
        )
    if generation.continue_final_message and not ends_with_answer:
        raise FeedbackFormatError(
            "does not end with a message of the assistant, which continue_final_message would continue",
            "leave continue_final_message out to have the prompt answered",
            field="prompt",
        )


def _padded(vectors: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(vectors, (0, 0, 0, width - len(vectors)))


def _completion(pieces: Sequence[Chunk]) -> Completion:
    last = pieces[-1]
    ids = tuple(token for piece in pieces for token in piece.ids)
    text = "".join(piece.text for piece in pieces)
    reason = cast(FinishReason, last.finish_reason)  # None only before the last chunk
    return Completion(text, ids, reason, last.prompt_tokens, len(ids), last.known_user)
