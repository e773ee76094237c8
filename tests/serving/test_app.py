"""What clients of the server meet, with an engine that says prompts back."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import httpx
import openai
import pytest
from serving_helpers import CHAT, EchoEngine, serving, writer

from prlhf_lightning.data.feedback_log import FeedbackLog
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.auth import APIKey, KeyRing
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.metrics import Metrics
from prlhf_lightning.serving.protocol import TimeoutProtocol
from prlhf_lightning.serving.services import Services

ANSWER = {"role": "assistant", "content": "four"}
PAIR = {"user": "ann", "prompt": "which?", "chosen": "this", "rejected": "that"}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return FeedbackLog(str(tmp_path_factory.mktemp("log") / "feedback.db"))


@pytest.fixture(scope="module")
def client(log):
    services = Services(writer(), EchoEngine, log, limits=Limits(max_prompt=500, max_body=5000))
    with serving(services) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def guarded():
    """A server with one key for everyone and one for team a."""
    keys = [APIKey("all", sha256(b"open").hexdigest()), APIKey("a", sha256(b"team").hexdigest(), "team-a-*")]
    with serving(Services(writer(), EchoEngine, None, KeyRing(keys))) as url, httpx.Client(base_url=url) as client:
        yield client


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def code(response):
    """The error's code, after a check of its form."""
    error = response.json()
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    return error["error"]["code"]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"user": "ann"}, "known", "ann: one two three"),
        ({"user": "zoë 李"}, "known", "zoë 李: one two three"),
        ({"user": "stranger"}, "unknown", "stranger: one two three"),
        ({}, "none", "None: one two three"),
        ({"blend": {"ann": 0.5, "bob": 1.5}}, "blend", "{'ann': 0.25, 'bob': 0.75}: one two three"),
    ],
)
def test_an_answer_says_for_whom_it_is(client, asked, status, says):
    response = client.post("/v1/chat/completions", json=CHAT | asked)
    answer = schemas.ChatCompletion.model_validate(response.json())
    assert answer.choices[0].message.content == says
    assert response.headers["x-personalization"] == answer.personalization.status == status
    assert answer.personalization.unknown_users == (["stranger"] if status == "unknown" else [])


def test_users_are_known_by_their_pseudonyms():
    with serving(Services(writer(), EchoEngine, rename=str.lower)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"user": "ANN"})
        assert (answer.headers["x-personalization"], answer.json()["choices"][0]["message"]["content"][:3]) == (
            "known",
            "ann",
        )
        assert httpx.get(f"{url}/v1/users").json()["data"] == []  # pseudonyms are no ids to write for


def test_a_stream_is_the_answer_in_pieces(client):
    asked = CHAT | {"user": "ann", "stream": True, "stream_options": {"include_usage": True}}
    pieces = [
        schemas.ChatCompletionChunk.model_validate(e) for e in events(client.post("/v1/chat/completions", json=asked))
    ]
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content for p in pieces if p.choices) == "ann: one two three"
    assert [p.choices[0].finish_reason for p in pieces if p.choices] == [None] * 4 + ["stop"]
    assert pieces[-1].usage.model_dump() == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    assert len({p.id for p in pieces}) == 1


def test_completions_go_on_with_a_text_and_stop_at_the_limit(client):
    asked = {"model": "echo", "prompt": "a b c", "max_tokens": 2}
    whole = schemas.Completion.model_validate(client.post("/v1/completions", json=asked).json())
    streamed = events(client.post("/v1/completions", json=asked | {"stream": True}))
    assert whole.choices[0].text == "".join(e["choices"][0]["text"] for e in streamed) == "None: a"
    assert whole.choices[0].finish_reason == streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_the_official_client_works_unchanged(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0) as official:
        assert official.models.list().data[0].id == official.models.retrieve("echo").id == "echo"
        whole = official.chat.completions.create(**CHAT, user="ann", extra_body={"strength": 0.5})
        assert whole.choices[0].message.content == "ann: one two three"
        pieces = official.chat.completions.create(**CHAT, user="bob", stream=True)
        assert "".join(piece.choices[0].delta.content for piece in pieces) == "bob: one two three"
        assert official.completions.create(model="echo", prompt="x").choices[0].text == "None: x"
        with pytest.raises(openai.NotFoundError):
            official.chat.completions.create(**CHAT | {"model": "other"})
        broken = official.completions.create(model="echo", prompt="x break y", stream=True)
        with pytest.raises(openai.APIError, match="model failed"):
            list(broken)


TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"messages": [IMAGE]}, "messages.0.content.0.type"),
        ({"extra_body": {"strenght": 1}}, "strenght"),
    ],
)  # fmt: skip
def test_an_unsupported_parameter_is_refused_by_its_name(client, asked, param):
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)
    with official, pytest.raises(openai.BadRequestError, match=param) as refused:
        official.chat.completions.create(**CHAT | asked)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_of_two_limits_the_lower_holds(client):
    asked = CHAT | {"max_tokens": 3, "max_completion_tokens": 2}
    assert client.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ("{", 400, "invalid_json"),
        ("[]", 400, "invalid_value"),
        ("[" * 2000, 400, "invalid_json"),
        ("", 400, "missing_body"),
        (json.dumps(CHAT | {"tools": []}), 400, "unknown_parameter"),
        (json.dumps(CHAT | {"n": 2}), 400, "invalid_value"),
        (json.dumps(CHAT | {"temperature": float("nan")}), 400, "invalid_value"),
        (json.dumps(CHAT | {"max_tokens": "5"}), 400, "invalid_value"),
        (json.dumps(CHAT | {"blend": {"ann": -1}}), 400, "invalid_value"),
        (json.dumps(CHAT | {"messages": []}), 400, "invalid_value"),
        (json.dumps(CHAT | {"user": "\ud800"}), 400, "invalid_value"),
        (json.dumps(CHAT | {"user": "refuse"}), 400, "refused"),
        (json.dumps(CHAT | {"messages": [{"role": "system", "content": "be brief"}]}), 400, "no_chat_template"),
        (json.dumps(CHAT | {"messages": [*CHAT["messages"], ANSWER]}), 400, "prompt_ends_with_answer"),
        (json.dumps(CHAT | {"continue_final_message": True}), 400, "contradictory_parameters"),
        (json.dumps(CHAT | {"add_generation_prompt": False}), 400, "contradictory_parameters"),
        (json.dumps(CHAT | {"stream_options": {"include_usage": True}}), 400, "contradictory_parameters"),
        (json.dumps(CHAT | {"model": "gpt"}), 404, "model_not_found"),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * 501}]}), 413, "prompt_too_large"),
        ("x" * 5001, 413, "too_large"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(client, body, status, expected):
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, code(response)) == (status, expected)


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("chat/completions", CHAT | {"seed": -1}),
        ("chat/completions", CHAT | {"add_generation_prompt": True, "continue_final_message": False}),
        ("completions", {"model": "echo", "prompt": ["one two three"]}),
    ],
    ids=["seed below zero", "vLLM's parameters with their usual values", "a list of one prompt"],
)
def test_what_openai_and_vllm_take_is_taken(client, route, asked):
    assert client.post(f"/v1/{route}", json=asked).status_code == 200


def test_a_body_of_unknown_length_has_the_same_limit(client):
    chunks = (b" " * 1000 for _ in range(10))
    response = client.post("/v1/feedback", content=chunks, headers={"content-type": "application/json"})
    assert (response.status_code, code(response)) == (413, "too_large")


def test_feedback_that_training_could_not_read_is_refused(client, log):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    before, response = log.extent(), client.post("/v1/feedback", json=PAIR | {"prompt": turns})
    assert (response.status_code, code(response), log.extent()) == (400, "no_chat_template", before)


def test_routes_and_methods_that_are_not_there(client):
    missing, wrong = client.get("/v1/nothing"), client.put("/v1/models")
    assert (missing.status_code, wrong.status_code, wrong.headers["allow"]) == (404, 405, "GET")
    assert (code(missing), code(wrong)) == ("not_found", "method_not_allowed")


def test_an_engine_that_fails_is_replaced(client):
    broken = client.post("/v1/completions", json={"model": "echo", "prompt": "x break"})
    assert (broken.status_code, code(broken)) == (500, "engine_failed")
    assert (
        client.post("/v1/completions", json={"model": "echo", "prompt": "x"}).json()["choices"][0]["text"] == "None: x"
    )
    assert client.get("/readyz").status_code == 200


def test_keys_open_the_api_for_their_users_only(guarded):
    def ask(key, **more):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return guarded.post("/v1/chat/completions", json=CHAT | more, headers=headers)

    assert [ask(key).status_code for key in ("", "wrong", "ope", "open", "team")] == [401, 401, 401, 200, 200]
    assert ask("").headers["www-authenticate"] == "Bearer"
    assert [ask("team", user=user).status_code for user in ("team-a-1", "ann")] == [200, 403]
    assert ask("team", blend={"team-a-1": 1, "ann": 1}).status_code == 403
    listed = guarded.get("/v1/users", headers={"authorization": "Bearer team"}).json()
    assert listed == {"object": "list", "data": [{"id": "team-a-1", "object": "user"}], "has_more": False}
    assert guarded.get("/healthz").status_code == 200


@pytest.fixture(scope="module")
def named():
    """A server that knows its names."""
    services = Services(writer(), EchoEngine, hosts=["box.lan", "*.example.org"])
    with serving(services) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:1", "[::1]:1", "Box.lan", "a.example.org:80", "localhost."])
def test_a_server_answers_to_its_names(named, host):
    assert named.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.com:1", "example.org", "127.0.0.1.evil.com", "[evil]", "localhost@evil.com"])
@pytest.mark.parametrize("path", ["/v1/models", "/", "/metrics"])
def test_a_server_answers_to_no_name_of_others(named, host, path):
    answer = named.get(path, headers={"host": host})
    assert (answer.status_code, code(answer)) == (403, "host_not_allowed")
    assert "--allowed_hosts" in answer.json()["error"]["message"]


def test_a_request_without_a_good_key_is_logged_without_the_key(guarded, caplog):
    for headers in ({}, {"authorization": "Bearer nearly"}):
        guarded.get("/v1/models", headers=headers)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"A request from 127.0.0.1 came with {what} API key." for what in ("no", "a wrong")]


def test_the_log_holds_nothing_that_people_wrote(client, caplog):
    caplog.set_level(logging.DEBUG)
    client.post("/v1/completions", json={"model": "echo", "prompt": "secret break", "user": "secret"})
    client.post("/v1/completions", json={"model": "echo", "prompt": "secret refuse", "user_text": "secret"})
    client.post("/v1/feedback", json=PAIR | {"chosen": "secret"})
    client.get("/v1/users?prefix=secret")
    client.get("/v1/models/secret")
    wanted, deadline = {"/v1/completions", "/v1/feedback", "/v1/users", "/v1/models/{name}"}, time.monotonic() + 30
    while True:  # a line is written after its answer was sent
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("prlhf_lightning")]
        routes = {json.loads(message)["route"] for message in ours if message.startswith("{")}
        if routes >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert routes >= wanted
    assert any("The engine failed: RuntimeError" in message for message in ours)
    assert "secret" not in "".join(ours)


def test_clients_can_not_make_up_metrics(client):
    for method in ("MADE-UP-1", "MADE-UP-2"):
        assert client.request(method, "/v1/models").status_code == 405
    assert "MADE-UP" not in client.get("/metrics").text


def test_a_model_may_have_a_slash_in_its_name():
    served = writer()
    served.name = "org/model"
    with serving(Services(served, EchoEngine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as official:
        assert official.models.retrieve("org/model").id == "org/model"


def test_metrics_count_what_has_been_done(client):
    client.post("/v1/completions", json={"model": "echo", "prompt": "x", "user": "stranger"})
    said = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in said.splitlines() if not line.startswith("#"))
    assert float(values["prlhf_generated_tokens_total"]) >= 2
    assert float(values["prlhf_unknown_users_total"]) >= 1
    route = 'route="/v1/completions"'
    assert float(values[f'prlhf_http_requests_total{{method="POST",{route},status="200"}}']) >= 1
    assert (
        values[f'prlhf_http_request_seconds_bucket{{le="+Inf",{route}}}']
        == values[f"prlhf_http_request_seconds_count{{{route}}}"]
    )


def test_large_counts_are_told_to_the_last_digit():
    metrics = Metrics()
    metrics.generated_tokens.inc(123_456_789)
    (line,) = (
        line for line in metrics.render().decode().splitlines() if line.startswith("prlhf_generated_tokens_total")
    )
    assert float(line.split()[1]) == 123_456_789


def test_feedback_is_written_down_once(client, log):
    before = log.extent().rows
    sent = [client.post("/v1/feedback", json=PAIR | {"id": "a"}) for _ in range(2)]
    assert [(r.status_code, r.json()["duplicate"]) for r in sent] == [(201, False), (200, True)]
    other = client.post("/v1/feedback", json=PAIR | {"id": "a", "chosen": "neither"})
    assert (other.status_code, code(other)) == (409, "id_in_use")
    thumb = {"user": "ann", "prompt": "which?", "completion": "this", "label": "up"}
    assert client.post("/v1/feedback", json=thumb).status_code == 201
    assert client.post("/v1/feedback", json=thumb | {"label": False}).status_code == 201  # as in files
    assert log.extent().rows == before + 3
    assert [row["label"] for _, row in log.thumbs()][-2:] == [True, False]
    assert client.post("/v1/feedback", json=thumb | {"chosen": "x"}).status_code == 400


def test_a_log_that_cannot_be_written_is_not_acknowledged(tmp_path):
    log = FeedbackLog(str(tmp_path / "feedback.db"))
    log._engine.connect().exec_driver_sql("DROP TABLE prlhf_feedback").connection.commit()
    with serving(Services(writer(), EchoEngine, log)) as url:
        response = httpx.post(f"{url}/v1/feedback", json=PAIR)
        assert (response.status_code, code(response), httpx.get(f"{url}/readyz").status_code) == (
            503,
            "log_unavailable",
            503,
        )


def test_a_slow_log_does_not_hold_up_writing(tmp_path):
    log, release = FeedbackLog(str(tmp_path / "feedback.db")), threading.Event()
    log.append = lambda feedback: release.wait(30)
    with serving(Services(writer(), EchoEngine, log)) as url, ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(httpx.post, f"{url}/v1/feedback", json=PAIR, timeout=60) for _ in range(60)]
        started = time.monotonic()
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
        assert time.monotonic() - started < 5
        release.set()
        assert {future.result().status_code for future in waiting} <= {201, 503}


def test_readiness_is_told_while_feedback_waits_for_a_slow_log(tmp_path):
    log, release = FeedbackLog(str(tmp_path / "feedback.db")), threading.Event()
    log.append = lambda feedback: release.wait(30)
    with serving(Services(writer(), EchoEngine, log)) as url, ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(httpx.post, f"{url}/v1/feedback", json=PAIR, timeout=60) for _ in range(20)]
        time.sleep(0.3)
        started = time.monotonic()
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert time.monotonic() - started < 3
        release.set()
        assert {future.result().status_code for future in waiting} <= {201, 503}


def test_a_broken_feedback_log_is_told_once_in_the_server_log(tmp_path, caplog):
    file = tmp_path / "feedback.db"
    log = FeedbackLog(str(file))
    with serving(Services(writer(), EchoEngine, log)) as url, caplog.at_level("INFO", "prlhf_lightning.serving"):
        file.rename(tmp_path / "moved.db")
        assert {httpx.post(f"{url}/v1/feedback", json=PAIR).status_code for _ in range(3)} == {503}
        (tmp_path / "moved.db").rename(file)
        assert httpx.post(f"{url}/v1/feedback", json=PAIR).status_code == 201
    told = [record.getMessage() for record in caplog.records if record.name == "prlhf_lightning.serving"]
    assert len(told) == 2
    assert "the file is gone; put it back" in told[0]
    assert told[1] == "The feedback log can be used again."


def test_answers_are_sent_without_waiting_for_acknowledgments(monkeypatch):
    made, connected = TimeoutProtocol.connection_made, []
    monkeypatch.setattr(TimeoutProtocol, "connection_made", lambda self, to: connected.append(to) or made(self, to))
    with serving(Services(writer(), EchoEngine)) as url, httpx.Client() as kept_open:
        kept_open.get(f"{url}/healthz")
        (connection,) = connected
        assert connection.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class Learner:
    """Remembers what it was taught; learns nobody by the name of `trained`, and breaks at `broken`."""

    def __init__(self):
        self.taught = {}

    def __call__(self, user_id, rows, between):
        if user_id == "trained":
            raise ConfigurationError("trained on this user")
        if user_id == "broken":
            raise RuntimeError("secret")
        self.taught[user_id] = [row["chosen"] for row in rows]


def test_users_are_learned_from_their_own_pairs(tmp_path):
    log, learner = FeedbackLog(str(tmp_path / "feedback.db")), Learner()
    with serving(Services(writer(), EchoEngine, log, learner=learner)) as url, httpx.Client(base_url=url) as client:
        for user in ("eve", "trained", "broken"):
            client.post("/v1/feedback", json=PAIR | {"user": user, "chosen": f"{user}'s"})
        learned = {
            user: client.post("/v1/adapt", json={"user": user}) for user in ("eve", "trained", "broken", "nobody")
        }
        assert [response.status_code for response in learned.values()] == [200, 409, 500, 409]
        assert learned["eve"].json() == {"user": "eve", "object": "user", "pairs": 1}
        assert [code(learned[user]) for user in ("trained", "nobody")] == ["cannot_learn", "no_pairs"]
        assert learner.taught == {"eve": ["eve's"]}
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_only_so_many_users_are_learned(tmp_path):
    log, served = FeedbackLog(str(tmp_path / "feedback.db")), writer()

    def learn(user, rows, between):
        served.vocabulary = served.vocabulary.plus(user) if user not in served.vocabulary else served.vocabulary

    services = Services(served, EchoEngine, log, limits=Limits(max_learned=2), learner=learn)
    with serving(services) as url, httpx.Client(base_url=url) as client:
        for user in ("eve", "max", "ida"):
            client.post("/v1/feedback", json=PAIR | {"user": user})
        answers = [client.post("/v1/adapt", json={"user": user}) for user in ("eve", "max", "ida", "eve")]
    assert [answer.status_code for answer in answers] == [200, 200, 409, 200]
    assert "max_learned" in answers[2].json()["error"]["message"]


def test_without_a_learner_there_is_no_route_for_it(client):
    assert client.post("/v1/adapt", json={"user": "eve"}).status_code == 404
