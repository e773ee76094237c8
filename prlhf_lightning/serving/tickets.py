"""A request for text, from its arrival to its last piece, and the queue in which callers take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from prlhf_lightning.inference import Generation, Piece


class Overloaded(Exception):
    """As many requests are open as the server takes."""


class Closing(Exception):
    """The server is shutting down."""


class EngineFailed(Exception):
    """The engine failed while it wrote this and other requests; the next ones are written by a new one."""


class Ticket:
    """A request: once it is accepted, iterate over the pieces of its answer.

    Iterating raises EngineFailed where the engine fails, and Closing where the server ends before the answer.

    Args:
        generation: What is asked.
        caller: Who asks: those who take turns.
        close: Called with this ticket when nobody waits for it any more.
    """

    def __init__(self, generation: Generation, caller: str, close: Callable[[Ticket], None]) -> None:
        self.generation, self.caller = generation, caller
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.number = -1  # of the engine's thread, which alone uses it
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._close = close

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces until one has a finish reason."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Stop writing. Does nothing where the answer is complete."""
        self._close(self)

    def put(self, event: Event) -> bool:
        """Take in what the engine has to say; return whether it was the last."""
        if event is None or (isinstance(event, Exception) and not self.accepted.done()):
            if not self.accepted.done():
                self.accepted.set_exception(event) if event else self.accepted.set_result(None)
            return event is not None
        self._pieces.put_nowait(event)
        return isinstance(event, Exception) or event.finish_reason is not None


Event: TypeAlias = Piece | Exception | None
"""A piece, an error, or nothing: the request was accepted."""


class FairQueue:
    """First come, first served among the requests of one caller; callers take turns."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Ticket]] = {}  # in the order of their turns; none is empty

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, ticket: Ticket) -> None:
        """Line a request up behind its caller's others."""
        self._lines.setdefault(ticket.caller, deque()).append(ticket)

    def pop(self) -> Ticket:
        """Return the next request of the caller whose turn it is."""
        caller = next(iter(self._lines))
        line = self._lines.pop(caller)
        ticket = line.popleft()
        if line:
            self._lines[caller] = line  # behind all others
        return ticket

    def discard(self, ticket: Ticket) -> None:
        """Forget a request; one that is not here is no error."""
        line = self._lines.get(ticket.caller, deque())
        if ticket in line:
            line.remove(ticket)
            if not line:
                del self._lines[ticket.caller]
