"""The scheduler between many requests (coroutines) and the one engine, which runs in a thread."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeAlias, TypeVar

from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.inference import Chunk, GenerationRequest
from prlhf_lightning.serving.metrics import Metrics

T = TypeVar("T")
_log = logging.getLogger("prlhf_lightning.serving")
_FAILURES_UNTIL_UNWELL = 3
_MOST_CALLS = 4  # waiting calls; each delays all running texts
# Requests that the engine holds, tokenized and embedded, before there is room for them, and that join it in one step.
_AHEAD = 8


class WritingEngine(Protocol):
    """The methods of `inference.Engine` that the scheduler uses."""

    def add(self, generation: GenerationRequest) -> int:
        """Add a request and return its number."""

    def cancel(self, number: int) -> None:
        """Forget a request."""

    def step(self) -> list[Chunk]:
        """Generate the next token of every request."""

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""


@dataclass(frozen=True)
class _Add:
    ticket: PendingRequest


@dataclass(frozen=True)
class _Cancel:
    ticket: PendingRequest


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    done: asyncio.Future[Any]


class Scheduler:
    """Runs an engine in its own thread and delivers its chunks to the waiting requests.

    All methods but the thread's own are of the event loop.

    Args:
        make_engine: Returns a new engine; called at the start and after a failure.
        max_open: Maximum number of waiting and running requests.
        metrics: Counters of steps, tokens and failures.
    """

    def __init__(self, make_engine: Callable[[], WritingEngine], max_open: int, metrics: Metrics) -> None:
        self._make_engine, self._max_open, self._metrics = make_engine, max_open, metrics
        self._inbox: SimpleQueue[_Add | _Cancel | _Call | None] = SimpleQueue()
        self._open: dict[PendingRequest, None] = {}  # in order of arrival
        self._closing = False
        self._ended = False  # the thread, as far as the event loop knows
        self._engine = make_engine()
        self._calls: deque[_Call] = deque()  # that came while another was being made
        self._waiting = FairQueue()
        self._writing: dict[int, PendingRequest] = {}
        self._ending = False
        self._failures = 0  # since the last successful step
        self._calling: dict[str, asyncio.Future[Any]] = {}  # calls that have not been answered, by who asked
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        metrics.open_requests.set_function(lambda: len(self._open))

    def start(self) -> None:
        """Start the thread; call this in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def well(self) -> bool:
        """Whether the engine is expected to work."""
        return self._thread.is_alive() and not self._closing and self._failures < _FAILURES_UNTIL_UNWELL

    async def submit(self, generation: GenerationRequest, caller: str = "") -> PendingRequest:
        """Queue a request and return it once the engine has accepted it, shortly before there is room for it.

        Args:
            generation: The request.
            caller: The caller. Callers take turns, however many requests each has.

        Raises:
            Overloaded: Too many requests are open.
            Closing: The server is shutting down.
            EngineFailed: The engine failed.
            PRLHFError: The engine refuses the request.
        """
        if self._closing or self._ended:
            raise Closing
        if len(self._open) >= self._max_open:
            self._make_room(caller)
        ticket = PendingRequest(generation, caller, self._close)
        self._open[ticket] = None
        self._inbox.put(_Add(ticket))
        try:
            await ticket.accepted
        except BaseException:
            ticket.cancel()
            raise
        return ticket

    def _make_room(self, caller: str) -> None:
        """Reject the newest waiting request of the caller with the most, if that is more than `caller` would have."""
        counts = Counter(ticket.caller for ticket in self._open)
        greediest, most = counts.most_common(1)[0]
        waiting = [ticket for ticket in self._open if ticket.caller == greediest and not ticket.accepted.done()]
        if most <= counts[caller] + 1 or not waiting:
            raise Overloaded
        self._dismiss(waiting[-1], Overloaded())

    async def call(self, function: Callable[[], T], caller: str = "") -> T:
        """Have the thread call something between two steps, and return what it returns.

        Writing waits meanwhile, but for a step whenever the function calls `go_on`.

        Args:
            function: What to call.
            caller: Who asks. Each has one call at a time.

        Raises:
            Overloaded: Too many calls are waiting, or one of this caller's.
            Closing: The server is shutting down.
            EngineFailed: Something unforeseen went wrong.
            PRLHFError: As the function raises it.
        """
        if self._closing or self._ended:
            raise Closing
        if caller in self._calling or len(self._calling) >= _MOST_CALLS:
            raise Overloaded
        done: asyncio.Future[T] = self._loop.create_future()
        self._calling[caller] = done
        done.add_done_callback(lambda _: self._calling.pop(caller))
        self._inbox.put(_Call(function, done))
        return await done

    def end_within(self, seconds: float) -> None:
        """Accept no more requests, and fail those that are unfinished after `seconds`."""
        self._closing = True
        self._loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        for ticket in list(self._open):
            self._dismiss(ticket, Closing())

    async def drain(self) -> None:
        """Accept no more requests, finish the running ones, and end the thread."""
        self._closing = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _close(self, ticket: PendingRequest) -> None:
        if ticket in self._open:
            del self._open[ticket]
            self._inbox.put(_Cancel(ticket))

    def _dismiss(self, ticket: PendingRequest, why: Exception) -> None:
        ticket.put(why)
        self._close(ticket)

    def _deliver(self, events: list[tuple[PendingRequest, Event]]) -> None:
        for ticket, event in events:
            if ticket in self._open and ticket.put(event):
                del self._open[ticket]

    def _give_all_up(self) -> None:
        """Answer whatever is still open, for the thread has ended.

        What was asked for since then is among it, and nothing is asked for after this: both are of the event loop.
        """
        self._ended = True
        for ticket in list(self._open):
            self._dismiss(ticket, EngineFailed())
        for done in list(self._calling.values()):
            _settle(done, EngineFailed())

    def _send(self, events: list[tuple[PendingRequest, Event]]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while not (self._ending and self._idle):
                try:
                    self._obey()
                    self._feed()
                    if not self._engine.idle:
                        self._step()
                except Exception as error:
                    self._recover(error)
        finally:
            self._loop.call_soon_threadsafe(self._give_all_up)

    @property
    def _idle(self) -> bool:
        return self._engine.idle and not self._waiting

    def _obey(self) -> None:
        """Line requests up and cancel them; where there is nothing to write, wait for one.

        At most one call, so that any number of them can't stop the writing.
        """
        while self._calls or not self._inbox.empty() or (self._idle and not self._ending):
            order = self._calls.popleft() if self._calls else self._inbox.get()
            if isinstance(order, _Call):
                self._do(order)
                return
            self._line_up(order)

    def _line_up(self, order: _Add | _Cancel | None) -> None:
        if order is None:
            self._ending = True
        elif isinstance(order, _Add):
            self._waiting.push(order.ticket)
        elif self._writing.get(order.ticket.number) is order.ticket:  # not of an engine that has failed since
            del self._writing[order.ticket.number]
            self._engine.cancel(order.ticket.number)
        else:
            self._waiting.discard(order.ticket)

    def go_on(self) -> None:
        """Take in what has come and write one token of every text; for what `call` calls, in between its own work."""
        while not self._inbox.empty():
            order = self._inbox.get()
            if isinstance(order, _Call):
                self._calls.append(order)
            else:
                self._line_up(order)
        try:
            self._feed()
            if not self._engine.idle:
                self._step()
        except Exception as error:  # of the texts that are being written, and not of the call
            self._recover(error)

    def _feed(self) -> None:
        """Hand the engine the next few requests; those that wait here are text still, nothing tokenized or embedded."""
        for _ in range(_AHEAD - self._engine.waiting):
            if not self._waiting:
                return
            self._add(self._waiting.pop())

    def _add(self, ticket: PendingRequest) -> None:
        try:
            ticket.number = self._engine.add(ticket.generation)
        except PRLHFError as error:
            self._send([(ticket, error)])
        except Exception as error:  # of this request alone: nothing else has been touched
            self._report(error)
            self._send([(ticket, EngineFailed())])
        else:
            self._writing[ticket.number] = ticket
            self._send([(ticket, None)])

    def _do(self, order: _Call) -> None:
        try:
            self._answer(order.done, order.function())
        except PRLHFError as error:
            self._answer(order.done, error)
        except Exception as error:
            self._report(error)
            self._answer(order.done, EngineFailed())

    def _answer(self, done: asyncio.Future[Any], result: Any) -> None:
        self._loop.call_soon_threadsafe(_settle, done, result)

    def _step(self) -> None:
        started = time.monotonic()
        pieces = self._engine.step()
        self._failures = 0
        self._metrics.engine_step_seconds.observe(time.monotonic() - started)
        self._metrics.generated_tokens.inc(sum(piece.tokens for piece in pieces))
        self._send([(self._writing[piece.number], piece) for piece in pieces if piece.number in self._writing])
        for piece in pieces:
            if piece.finish_reason is not None:
                self._writing.pop(piece.number, None)

    def _recover(self, error: Exception) -> None:
        """Fail all running requests and create a new engine."""
        self._failures += 1
        self._report(error)
        self._send([(ticket, EngineFailed()) for ticket in self._writing.values()])
        self._writing = {}
        self._engine = self._make_engine()

    def _report(self, error: Exception) -> None:
        """Log the location of an error, but not its message, which may quote users' text."""
        self._metrics.engine_failures.inc()
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("The engine failed: %s\n%s", type(error).__name__, frames)


def _settle(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():  # the caller may have disconnected
        done.set_exception(result) if isinstance(result, Exception) else done.set_result(result)


class Overloaded(Exception):
    """The server has reached its limit of open requests."""


class Closing(Exception):
    """The server is shutting down."""


class EngineFailed(Exception):
    """The engine failed with all running requests; a new engine handles later ones."""


class PendingRequest:
    """An accepted request; iterate over it for the chunks of its answer.

    Iterating raises EngineFailed if the engine fails, and Closing if the server ends before the answer.

    Args:
        generation: What is asked.
        caller: Who asks: those who take turns.
        close: Called with this request when it is no longer awaited.
    """

    def __init__(self, generation: GenerationRequest, caller: str, close: Callable[[PendingRequest], None]) -> None:
        self.generation, self.caller = generation, caller
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.number = -1  # of the engine's thread, which alone uses it
        self._pieces: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._close = close

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish reason."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Stop generating; no effect on a complete answer."""
        self._close(self)

    def put(self, event: Event) -> bool:
        """Add an event of the engine; return whether it was the last."""
        if event is None or (isinstance(event, Exception) and not self.accepted.done()):
            if not self.accepted.done():
                self.accepted.set_exception(event) if event else self.accepted.set_result(None)
            return event is not None
        self._pieces.put_nowait(event)
        return isinstance(event, Exception) or event.finish_reason is not None


Event: TypeAlias = Chunk | Exception | None
"""A piece, an error, or nothing: the request was accepted."""


class FairQueue:
    """Round-robin queue over callers, first come, first served within a caller."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[PendingRequest]] = {}  # in the order of their turns; none is empty

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, ticket: PendingRequest) -> None:
        """Append a request to its caller's queue."""
        self._lines.setdefault(ticket.caller, deque()).append(ticket)

    def pop(self) -> PendingRequest:
        """Remove and return the next request of the next caller."""
        caller = next(iter(self._lines))
        line = self._lines.pop(caller)
        ticket = line.popleft()
        if line:
            self._lines[caller] = line  # behind all others
        return ticket

    def discard(self, ticket: PendingRequest) -> None:
        """Remove a request if it is in the queue."""
        line = self._lines.get(ticket.caller, deque())
        if ticket in line:
            line.remove(ticket)
            if not line:
                del self._lines[ticket.caller]
