"""By which names a server lets itself be called."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from starlette.types import ASGIApp, Receive, Scope, Send

from prlhf_lightning.serving.api_errors import APIError

_log = logging.getLogger("prlhf_lightning.serving")
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
