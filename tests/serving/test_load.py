"""Many clients at once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from hashlib import sha256

import httpx
import pytest
from serving_helpers import CHAT, EchoEngine, serving, writer

from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog
from prlhf_lightning.serving.auth import APIKey, KeyRing
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.services import Services


async def stream(client, user, text, most_lines=None):
    """Return the text of a streamed answer, or leave after some lines."""
    asked = {"model": "echo", "user": user, "prompt": text, "stream": True, "max_tokens": 200}
    said = ""
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                said += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
                most_lines = most_lines and most_lines - 1
                if most_lines == 0:
                    break
    return said


def together(url, *tasks):
    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(task(client) for task in tasks))

    return asyncio.run(run())


def test_no_text_reaches_another_user():
    def talk(i):
        async def turns(client):
            for turn in range(3):
                text = " ".join(f"marker-{i}-{turn}-{word}" for word in range(5 + i % 7))
                assert await stream(client, f"user-{i}", text) == f"user-{i}: {text}"

        return turns

    with serving(Services(writer(), lambda: EchoEngine(0.001))) as url:
        together(url, *(talk(i) for i in range(64)))


def test_an_engine_failure_is_seen_only_by_requests_in_progress():
    def ask(text):
        return lambda client: client.post("/v1/completions", json={"model": "echo", "prompt": text})

    with serving(Services(writer(), lambda: EchoEngine(0.01))) as url:
        statuses = [r.status_code for r in together(url, *(ask("a b break c") for _ in range(8)))]
        assert set(statuses) == {500}
        assert [r.status_code for r in together(url, *(ask("a b c") for _ in range(8)))] == [200] * 8


def test_more_requests_than_the_server_takes_are_sent_away():
    with serving(Services(writer(), lambda: EchoEngine(0.05), limits=Limits(max_open=4))) as url:
        answers = together(url, *(lambda client: client.post("/v1/chat/completions", json=CHAT) for _ in range(12)))
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(429) == 8
        assert {a.headers.get("retry-after") for a in answers if a.status_code == 429} == {"2"}
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200


def keyed(*names):
    """Keys, each of which is its own name."""
    return KeyRing(APIKey(name, sha256(name.encode()).hexdigest()) for name in names)


def ask_as(key, prompt="a b c d e f g h"):
    async def ask(client):
        headers = {"authorization": f"Bearer {key}"}
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": prompt}, headers=headers)
        return answer.status_code, time.monotonic()

    return ask


def later(task, seconds):
    async def wait(client):
        await asyncio.sleep(seconds)
        return await task(client)

    return wait


def test_keys_take_turns_however_much_one_of_them_asks():
    services = Services(writer(), lambda: EchoEngine(0.01, room=2), None, keyed("many", "one"))
    with serving(services) as url:
        *many, one = together(url, *[ask_as("many")] * 40, later(ask_as("one"), 0.2))
    ahead = sum(done < one[1] for _, done in many)
    assert {status for status, _ in (*many, one)} == {200}
    assert ahead < 25, "it waited for all who came before"


def test_a_full_queue_is_shared_among_keys():
    # An answer of eight words takes longer than the others' delay, so that none is done before they come.
    services = Services(writer(), lambda: EchoEngine(0.05, room=1), None, keyed("many", "few"), Limits(max_open=16))
    with serving(services) as url:
        answers = together(url, *[ask_as("many")] * 20, *[later(ask_as("few"), 0.2)] * 3)
    statuses = [status for status, _ in answers]
    assert statuses[20:] == [200] * 3
    assert Counter(statuses[:20]) == {200: 13, 429: 7}  # 4 too many, and 3 who made room


def test_a_client_who_leaves_the_queue_frees_a_place_at_once():
    def ask_until(seconds):
        async def ask(client):
            asked = {"model": "echo", "prompt": "word " * 150, "max_tokens": 200}
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=asked, timeout=seconds)

        return ask

    async def look(client):
        return (await client.get("/metrics")).text

    # The engine holds the nine who stay, and so does not come to those who leave.
    with serving(Services(writer(), lambda: EchoEngine(0.02, room=1))) as url:
        everybody = [*[ask_until(1.5)] * 9, *[later(ask_until(0.3), 0.3)] * 10]
        *_, said = together(url, *everybody, later(look, 1))
    assert "prlhf_open_requests 9.0\n" in said


def test_of_what_waits_the_engine_holds_only_a_few():
    held = []

    class Watched(EchoEngine):
        def add(self, generation):
            number = super().add(generation)
            held.append(self.waiting)
            return number

    with serving(Services(writer(), lambda: Watched(0.02, room=1))) as url:
        together(url, *[ask_as("any", "a b")] * 30)
    assert (len(held), max(held)) == (30, 8)


@pytest.mark.parametrize("streamed", [True, False])
def test_nothing_more_is_written_for_a_client_who_has_left(streamed):
    engine = EchoEngine(0.02)
    with serving(Services(writer(), lambda: engine)) as url:
        text = " ".join("word" for _ in range(150))
        if streamed:
            together(url, lambda client: stream(client, "ann", text, most_lines=2))
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{url}/v1/completions", json={"model": "echo", "prompt": text, "max_tokens": 200}, timeout=0.2
                )
        left = time.monotonic()
        while not engine.idle and time.monotonic() < left + 2:
            time.sleep(0.02)
        assert engine.idle
        assert "prlhf_open_requests 0.0\n" in httpx.get(f"{url}/metrics").text


def test_what_is_being_written_is_finished_at_the_end():
    got = []
    with serving(Services(writer(), lambda: EchoEngine(0.02))) as url:
        asked = {"model": "echo", "prompt": " ".join("word" for _ in range(30))}
        thread = threading.Thread(
            target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=asked, timeout=10))
        )
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert got[0].json()["choices"][0]["finish_reason"] == "stop"


def test_what_is_not_written_in_time_at_the_end_is_told_so():
    got = []
    with serving(Services(writer(), lambda: EchoEngine(0.05)), drain_seconds=0.5) as url:
        asked = {"model": "echo", "prompt": " ".join("word" for _ in range(150)), "max_tokens": 200}

        def ask(**more):
            got.append(httpx.post(f"{url}/v1/completions", json=asked | more, timeout=10))

        threads = [threading.Thread(target=ask, kwargs={"stream": streamed}) for streamed in (True, False)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        ended = time.monotonic()
    for thread in threads:
        thread.join()
    assert time.monotonic() < ended + 2
    whole, stream = sorted(got, key=lambda response: response.status_code, reverse=True)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "closing")
    last = stream.text.strip().split("\n\n")[-1]
    assert "word" in stream.text
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "closing"


def test_learning_holds_up_nobody_for_long(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log.append(Feedback("", "1", 0.0, "eve", "which?", chosen="this", rejected="that"))
    gaps, statuses = [], []

    async def write(client):
        asked, last = {"model": "echo", "prompt": " ".join("word" for _ in range(40)), "stream": True}, None
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            async for _ in response.aiter_lines():
                gaps.append(time.monotonic() - (last or time.monotonic()))
                last = time.monotonic()

    async def learn(client):
        await asyncio.sleep(0.1)
        statuses.append((await client.post("/v1/adapt", json={"user": "eve"})).status_code)

    services = Services(writer(), lambda: EchoEngine(0.005), log, learner=lambda *_: time.sleep(0.5))
    with serving(services) as url:
        together(url, write, *[learn] * 30)
        assert statuses.count(200) < 4  # of one caller's, one at a time
        assert httpx.post(f"{url}/v1/adapt", json={"user": "eve"}).status_code == 200
    assert max(gaps) < 2  # and not 30 times 0.5 s
    assert set(statuses) == {200, 429}


def test_one_key_may_ask_only_so_often():
    with serving(Services(writer(), EchoEngine, limits=Limits(requests_per_minute=1, burst=3))) as url:
        answers = [httpx.get(f"{url}/v1/models") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 50 <= int(answers[-1].headers["retry-after"]) <= 60
