"""uvicorn's HTTP protocol with time limits for slow clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prlhf_lightning.serving.errors import APIError

_LINGER = 5.0  # seconds


class TimeoutProtocol(H11Protocol):
    """HTTP protocol with time limits for a request's headers and for reading the response.

    A connection with incomplete headers gets 408 and is closed; one that does not read its response is closed too.
    `BodyLimit` handles bodies.
    """

    seconds = 30.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer for the headers of a request."""
        # Heads and bodies are sent one after the other, and with Nagle's algorithm the second would wait up to 40 ms
        # for the client's acknowledgment. asyncio sets this only on sockets that were made with a protocol number.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(_LingeringTransport(transport, self._is_sending))  # type: ignore[arg-type]
        self._late, self._stuck = _Timer(self._give_up), _Timer(self.transport.abort)
        self._late.start(self.seconds)

    def data_received(self, data: bytes) -> None:
        """Read data; the first part of the headers starts their timer."""
        if self.transport.is_closing():  # the rest of a request that has been refused
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # there is a request
            self._late.stop()
        else:
            self._late.start(self.seconds)

    def pause_writing(self) -> None:
        """Stop writing, and start the timer for the client to read."""
        super().pause_writing()
        self._stuck.start(self.seconds)

    def resume_writing(self) -> None:
        """Resume writing and stop the timer."""
        super().resume_writing()
        self._stuck.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        self._late.stop()
        self._stuck.stop()

    def _is_sending(self) -> bool:
        """Whether the client may be in the middle of a request."""
        return self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])

    def _give_up(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:  # a part of a head
            late = APIError(408, f"The request was not there after {self.seconds:g} seconds.", "too_slow").response()
            headers = [*late.raw_headers, (b"connection", b"close")]
            events = (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=bytes(late.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class _LingeringTransport:
    """A transport whose `close` lets a client who is still sending read the last response.

    A socket that is closed while data comes in resets the connection, and the client loses a response that it has not
    read yet (RFC 9112, section 9.6). So only the sending side is closed at first. The rest is closed when the client
    closes its own side, or after a few seconds.

    Args:
        transport: The transport; all that is not here is passed on to it.
        is_sending: Whether the client may be in the middle of a request.
    """

    def __init__(self, transport: asyncio.BaseTransport, is_sending: Callable[[], bool]) -> None:
        self._transport: Any = transport
        self._is_sending = is_sending
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not (self._is_sending() and self._transport.can_write_eof()):
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(_LINGER, self._transport.abort)


class _Timer:
    """Calls a function after a delay unless stopped; starting a running timer has no effect."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(seconds, self._function)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
