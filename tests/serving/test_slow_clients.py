"""Clients who send or read slowly, or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from unittest import mock
from urllib.parse import urlsplit

import pytest
import uvicorn
from serving_helpers import EchoEngine, serving, writer
from uvicorn.server import ServerState

from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.server import make_server
from prlhf_lightning.serving.services import Services

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"


@pytest.fixture(scope="module")
def url():
    with serving(Services(writer(), EchoEngine, limits=Limits(read_seconds=0.5))) as url:
        yield url


def connect(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=5)


def drip(connection, data, every=0.1):
    """Send a byte at a time, without end, until the server has had enough; return what it said."""
    connection.settimeout(every)
    started, said = time.monotonic(), b""
    connection.sendall(data)
    while time.monotonic() < started + 5:
        try:
            part = connection.recv(4096)
        except TimeoutError:
            connection.sendall(b"x")
            continue
        if not part:
            return said, time.monotonic() - started
        said += part
    raise AssertionError("it waited for ever")


@pytest.mark.parametrize("sent", [HEAD[:40], HEAD, HEAD + b'{"model": '], ids=["head", "body", "rest of body"])
def test_a_request_that_comes_too_slowly_is_answered_408(url, sent):
    with connect(url) as connection:
        said, seconds = drip(connection, sent)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "too_slow"
    assert 0.4 < seconds < 3


@pytest.mark.parametrize("sent", [HEAD[:40], HEAD + b'{"model": '], ids=["head", "body"])
def test_a_client_who_keeps_sending_can_read_the_refusal(url, sent):
    with connect(url) as connection:
        connection.sendall(sent)
        connection.recv(1, socket.MSG_PEEK)  # the refusal is there
        for _ in range(3):  # the first data for a closed socket resets the connection, which the next call would see
            time.sleep(0.02)
            connection.sendall(b"x" * 10)
        said = b"".join(iter(lambda: connection.recv(4096), b""))
    assert said.startswith(b"HTTP/1.1 408 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"


def test_a_connection_on_which_nothing_comes_is_closed(url):
    with connect(url) as connection:
        assert connection.recv(100) == b""


def test_a_slow_answer_is_no_slow_request():
    body = json.dumps({"model": "echo", "prompt": "a b c d e f"}).encode()
    services = Services(writer(), lambda: EchoEngine(0.1), limits=Limits(read_seconds=0.3))
    with serving(services) as url, connect(url) as connection:
        connection.sendall(HEAD.replace(b"500", str(len(body)).encode()) + body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("reads_again", [True, False])
def test_only_a_client_who_does_not_read_in_time_is_cut_off(reads_again):
    protocol_class = make_server(Services(writer(), EchoEngine, limits=Limits(read_seconds=0.1)), 1).config.http

    async def wait():
        protocol = protocol_class(uvicorn.Config(None, log_config=None), ServerState(), {})
        protocol.connection_made(transport := mock.Mock())
        protocol.pause_writing()
        if reads_again:
            protocol.resume_writing()
        await asyncio.sleep(0.2)
        return transport.abort.called

    assert asyncio.run(wait()) is not reads_again
