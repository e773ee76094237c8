"""What stands before every route: the access log, keys and rates, and the limits of a body's size and time.

Plain ASGI, so that streams pass through piece by piece.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prlhf_lightning.serving.auth import ANYONE, APIKey, KeyRing, RateLimiter
from prlhf_lightning.serving.errors import APIError
from prlhf_lightning.serving.metrics import Metrics

_log = logging.getLogger("prlhf_lightning.serving")
access_log = logging.getLogger("prlhf_lightning.access")


class AccessLog:
    """Logs each request as a line of JSON, counts it, and answers errors that nobody has foreseen.

    The log holds the route's template and not the path, and nothing that people wrote.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, request_id, status, size = time.monotonic(), uuid4().hex, 0, 0

        async def watched(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))  # the message may quote what people wrote
            _log.error("Request %s failed: %s\n%s", request_id, type(error).__name__, frames)
            if not status:
                await APIError(500, "The server failed; the log says where.", "internal").response()(
                    scope, receive, watched
                )
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path_format", "none")
            # Of routes and methods that are not there a client can make up any number.
            method = "any" if route == "none" or status == 405 else scope["method"]
            self.metrics.http_requests.labels(method, route, str(status)).inc()
            self.metrics.http_seconds.labels(route).observe(seconds)
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": request_id,
                "key": scope.get("prlhf.key", ANYONE).name,
                "method": method,
                "route": route,
                "status": status,  # 0 where the client left before the answer began
                "bytes": size,
                "ms": round(1000 * seconds, 1),
            }
            access_log.info(json.dumps(line))


class AuthMiddleware:
    """Lets in to the API only who has a key and has not asked too often, before anything of a request is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limiter: RateLimiter) -> None:
        self.app, self.keys, self.limiter = app, keys, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                scope["prlhf.key"], scope["prlhf.caller"] = self._let_in(scope)
            except APIError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _let_in(self, scope: Scope) -> tuple[APIKey, str]:
        key = ANYONE
        caller = (scope.get("client") or ("",))[0]
        if self.keys:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            kind, _, secret = given.partition(" ")
            found = self.keys.find(secret.strip()) if kind.lower() == "bearer" else None
            if found is None:
                _log.warning("A request from %s came with %s API key.", caller, "a wrong" if given else "no")
                raise APIError(401, "Give a valid API key: `Authorization: Bearer KEY`.", "invalid_api_key")
            key, caller = found, f"key {found.name}"
        if wait := self.limiter.wait(caller):
            raise APIError(429, "Too many requests; try again later.", "rate_limit_exceeded", retry_after=wait)
        return key, caller


class BodyLimit:
    """Refuses bodies that are too large, at the latest when so much of them has been read, or that come too slowly."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told[:20]) > self.most:
            await self._error().response()(scope, receive, send)
            return
        read, deadline = 0, asyncio.get_running_loop().time() + self.seconds
        complete = False

        async def counted() -> Message:
            nonlocal read, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                late = f"The request was not there after {self.seconds:g} seconds; send it faster."
                raise HTTPException(408, late, {"connection": "close"}) from None
            complete = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, self._error().args[0])  # FastAPI passes on no other kind while it reads
            return message

        await self.app(scope, counted, send)

    def _error(self) -> APIError:
        return APIError(413, f"The request has more than {self.most} bytes, the most that are taken.", "too_large")


_MOST_SHOWN = 100  # characters of a name


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(address).is_loopback


class HostCheck:
    """Refuses requests in whose `Host` header there is another name than the server's.

    A page of any site can have its own name point to 127.0.0.1 (DNS rebinding), and its visitor's browser then sends
    to a server there whatever the page wants, under that name. Addresses and `localhost` are nobody else's names.

    Args:
        app: What stands behind it.
        names: Patterns of further names, such as `*.example.org`; None lets any name in.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if self.names is not None and scope["type"] == "http":
            name = _name(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
            if not _is_ours(name, self.names):
                shown = json.dumps(name[:_MOST_SHOWN])
                _log.warning("A request for the host %s was refused; --allowed_hosts lets it in.", shown)
                message = f"This server does not answer to the name {shown}; --allowed_hosts says to which it does."
                await APIError(403, message, "host_not_allowed").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _name(host: str) -> str:
    """Return a `Host` header without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _is_ours(name: str, names: Sequence[str]) -> bool:
    # Browsers always send a host; what sends none is a tool, such as a balancer's check.
    if name in ("", "localhost") or any(fnmatchcase(name, allowed.lower()) for allowed in names):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
