"""The server process: model, feedback log and web application, until a signal ends it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from prlhf_lightning.data.feedback_log import FeedbackLog
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Engine, Generator
from prlhf_lightning.serving.app import create_app
from prlhf_lightning.serving.auth import KeyRing
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.middleware import access_log, is_loopback
from prlhf_lightning.serving.protocol import TimeoutProtocol
from prlhf_lightning.serving.services import Learner, Ranker, Services
from prlhf_lightning.training.scorer import Scorer

_log = logging.getLogger("prlhf_lightning.serving")
_KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, so that they never write to a closed one
_LAST_WORDS = 5  # seconds after draining to send the last responses


def run(
    load: Callable[[], tuple[Generator, Learner | None, Scorer | None]],
    host: str,
    port: int,
    feedback: str | None,
    keys: Path | None,
    limits: Limits,
    drain_seconds: int,
    rename: Callable[[str], str] = str,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or Ctrl+C, then finish running answers.

    Args:
        load: Loads the model, its learner of users, and the reward model that ranks.
        host: Address to listen on.
        port: Port to listen on; 0 for any free port.
        feedback: URL of the feedback log, or None for none.
        keys: File of API keys.
        limits: Limits of the server.
        drain_seconds: Time in seconds for running answers at the end.
        rename: Returns the model's id of a user.
        allowed_hosts: Allowed patterns of the Host header, besides `localhost` and IP addresses. Without any, names are
            checked only if there are no keys and the server listens on this machine only.
    """
    _set_up_logs()
    ring = KeyRing.load(keys, os.environ)
    with _listen(host, port) as listener:
        log = FeedbackLog(feedback) if feedback else None
        writer, learner, scorer = load()
        ranker = None if scorer is None else Ranker(f"{writer.name}-reward", scorer)

        def engine() -> Engine:
            return Engine(writer, limits.max_batch, limits.max_batch_tokens)

        address, at = listener.getsockname()[:2]
        is_local = is_loopback(address)
        # Where there are keys, a page of another site has none to send, whatever it has its name point to.
        hosts = [*allowed_hosts, host] if allowed_hosts or (is_local and not ring) else None
        services = Services(
            writer, engine, log, ring, limits, rename=rename, learner=learner, ranker=ranker, hosts=hosts
        )
        server = make_server(services, drain_seconds)
        if not ring and not is_local:
            _log.warning("There are no API keys: whoever reaches %s may use this server. Give --keys.", host)
        shown = f"[{address}]" if ":" in address else address
        _log.info("Serving %s at http://%s:%d", writer.name, shown, at)
        # uvicorn drains, then sends itself the signal that it was stopped by; by then there is nothing left to do.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return


def make_server(services: Services, drain_seconds: float) -> uvicorn.Server:
    """Return a web server that is ready to run.

    Args:
        services: The services of its routes.
        drain_seconds: Time in seconds for running answers after a signal.
    """
    protocol = type("Protocol", (TimeoutProtocol,), {"seconds": services.limits.read_seconds})
    config = uvicorn.Config(
        create_app(services),
        http=protocol,
        ws="none",
        access_log=False,  # ours says more, and less of what people wrote
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + _LAST_WORDS,
    )
    return _DrainingServer(config, services, drain_seconds)


class _DrainingServer(uvicorn.Server):
    """A server that ends unfinished answers with an error, where uvicorn would disconnect."""

    def __init__(self, config: uvicorn.Config, services: Services, drain_seconds: float) -> None:
        super().__init__(config)
        self._services, self._drain_seconds = services, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and wait for running answers."""
        self._services.scheduler.end_within(self._drain_seconds)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, opened before the model is loaded, which may take long."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"host, port: can't listen on {host} port {port} ({error}); give others.") from error
    return listener


def _set_up_logs() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    access_log.handlers, access_log.propagate = [lines], False
    for chatty in ("httpx", "sqlalchemy"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
