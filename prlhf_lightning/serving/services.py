"""Services that the routes of a server share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from starlette.concurrency import run_in_threadpool

from prlhf_lightning.data.feedback_log import FeedbackLog, FeedbackLogError
from prlhf_lightning.inference import Generator
from prlhf_lightning.serving.auth import KeyRing
from prlhf_lightning.serving.errors import APIError
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.metrics import Metrics
from prlhf_lightning.serving.scheduler import Scheduler, WritingEngine
from prlhf_lightning.training.scorer import Scored, Scorer

T = TypeVar("T")
Prompt: TypeAlias = str | list[dict[str, str]]
# Of the 40 threads that the web framework has, so that a slow log never takes all of them.
_LOG_THREADS = 8
_LOG_WAIT_SECONDS = 10.0
_PROBE_WAIT_SECONDS = 3.0
_REPEAT_SECONDS = 60.0  # after which a lasting fault of the log is told again
_log = logging.getLogger("prlhf_lightning.serving")


class Learner(Protocol):
    """Adds a user who was not in training to the generator."""

    def __call__(self, user_id: str, rows: Sequence[Mapping[str, Any]], between: Callable[[], None]) -> None:
        """Learn a user and add them to the generator. Called in the engine's thread.

        Args:
            user_id: The user's id for the model.
            rows: Their pairs, in the format of `data.records.parse_record`.
            between: Generates one token of every running text; call it often.

        Raises:
            PRLHFError: This user can't be learned, or not from these pairs.
        """


class Ranker:
    """Scores texts in a thread, one request after another.

    Args:
        name: Name of the reward model in the API.
        scorer: The reward model.
    """

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self.scorer = name, scorer
        self._turn, self._open = asyncio.Lock(), 0  # a scorer is not for several threads

    async def score(self, user: str, prompt: Prompt, texts: Sequence[str], user_text: str, most: int) -> Scored:
        """Return the rewards of answers to a prompt for a user.

        Args:
            user: The model's id of the user.
            prompt: The prompt.
            texts: The answers.
            user_text: Text about the user, or empty.
            most: Maximum number of waiting and running requests.

        Raises:
            APIError: There are more.
            ConfigurationError: The model takes no such prompt.
        """
        if self._open >= most:
            raise APIError(429, "The server is busy; try again later.", "overloaded", retry_after=2)
        self._open += 1
        count = len(texts)
        try:
            async with self._turn:
                return await run_in_threadpool(
                    self.scorer.scored, [user] * count, [prompt] * count, texts, [user_text] * count
                )
        finally:
            self._open -= 1


@dataclass
class Services:
    """A model, its engine, and the other services of a server.

    Attributes:
        writer: The model.
        make_engine: Returns an engine for it.
        log: The feedback log; without it there is no feedback route.
        keys: The API keys.
        limits: Limits of the server.
        metrics: Counts and times.
        rename: Returns the model's id of a user.
        learner: Learns new users from their pairs; without it there is no route for that.
        ranker: Ranks texts; without it there is no route for that.
        hosts: Allowed patterns of the Host header, besides `localhost` and IP addresses; None for any.
    """

    writer: Generator
    make_engine: Callable[[], WritingEngine]
    log: FeedbackLog | None = None
    keys: KeyRing = field(default_factory=KeyRing)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    rename: Callable[[str], str] = str
    learner: Learner | None = None
    ranker: Ranker | None = None
    hosts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.started = int(time.time())
        self.scheduler = Scheduler(self.make_engine, self.limits.max_open, self.metrics)
        self._log_threads, self._probes = asyncio.Semaphore(_LOG_THREADS), asyncio.Semaphore(1)
        self._told: tuple[str, float] | None = None  # the log's last fault, and when it was told

    async def use_log(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that reads or writes the feedback log in a thread, a few at a time.

        Raises:
            FeedbackLogError: The log can't be used, or is so slow that no thread became free in time.
        """
        return await self._in_turn(self._log_threads, _LOG_WAIT_SECONDS, function, *args)

    async def check_log(self, log: FeedbackLog) -> None:
        """Raise FeedbackLogError where the log can't be used now; does not wait behind feedback that is written."""
        await self._in_turn(self._probes, _PROBE_WAIT_SECONDS, log.check)

    async def _in_turn(self, turns: asyncio.Semaphore, seconds: float, function: Callable[..., T], *args: Any) -> T:
        try:
            await asyncio.wait_for(turns.acquire(), seconds)
        except TimeoutError:
            raise FeedbackLogError("The feedback log is too slow now; too many calls are waiting for it.") from None
        try:
            result = await run_in_threadpool(function, *args)
        except FeedbackLogError as error:
            self._tell(str(error))
            raise
        finally:
            turns.release()
        if self._told is not None:
            self._told = None
            _log.info("The feedback log can be used again.")
        return result

    def _tell(self, fault: str) -> None:
        """Tell who runs the server what is wrong with the log, once a minute; the message quotes no feedback."""
        now = time.monotonic()
        if self._told is None or self._told[0] != fault or now - self._told[1] > _REPEAT_SECONDS:
            self._told = fault, now
            _log.warning("%s", fault)

    def prompt(self, prompt: Prompt) -> Prompt:
        """Return a prompt in the model's form, after checking its size.

        Models without a chat template know no turns: a conversation of one message of the user's is its text.
        """
        texts = [prompt] if isinstance(prompt, str) else [message["content"] or "" for message in prompt]
        self.check_size("prompt", *texts)
        is_one_turn = not isinstance(prompt, str) and [message["role"] for message in prompt] == ["user"]
        return texts[0] if is_one_turn and not self.writer.tokenizer.chat_template else prompt

    def check_size(self, name: str, *texts: str) -> None:
        """Refuse texts whose total length exceeds `limits.max_prompt`."""
        if sum(map(len, texts)) > self.limits.max_prompt:
            message = f"The {name} has more than {self.limits.max_prompt} characters, the most that are taken."
            raise APIError(413, message, f"{name}_too_large", name)

    def check_conversation(self, prompt: Prompt, param: str) -> None:
        """Refuse conversations of several turns without a chat template."""
        if not isinstance(prompt, str) and not self.writer.tokenizer.chat_template:
            message = "This model has no chat template: send one message, of role user."
            raise APIError(400, message, "no_chat_template", param)
