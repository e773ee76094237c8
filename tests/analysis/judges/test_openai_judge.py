"""A judge behind an endpoint, against a fake one on this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prlhf_lightning.analysis.judges import OpenAIJudge, Person, Question, Vote, judge_pair, openai_chat
from prlhf_lightning.errors import ConfigurationError, JudgeError

PERSON = Person("secret-id", "likes cats", (Vote("p", "purr", "bark"),))


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Endpoint:
    """Answers each request by `reply(question, number)`: a status and a body, or seconds to be silent."""

    def __init__(self, reply):
        outer, self.requests, self.reply = self, [], reply

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append((self.path, self.headers.get("authorization"), body))
                found = outer.reply(json.loads(body["messages"][1]["content"]), len(outer.requests))
                if isinstance(found, float):
                    threading.Event().wait(found)
                    return
                status, text = found
                self.send_response(status)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("KEY", "sk-very-secret")
    monkeypatch.setattr(openai_chat.time, "sleep", lambda seconds: None)
    opened = []

    def at(reply):
        opened.append(Endpoint(reply))
        return opened[-1]

    yield at
    for one in opened:
        one.server.shutdown()
        one.server.server_close()


def judge_at(endpoint, **settings):
    judge = OpenAIJudge("some-model", **{"base_url": endpoint.url, "api_key_env": "KEY", **settings})
    judge.prepare(None)
    return judge


def likes_cats(question, number):
    return completion("A" if "purr" in question["A"] else "B" if "purr" in question["B"] else "tie")


def test_it_is_asked_in_both_orders_and_told_of_the_user(endpoint):
    fake = endpoint(likes_cats)
    (ruling,) = judge_pair(judge_at(fake), [Question("say", PERSON, "woof", "purr")])
    assert (ruling.verdict, ruling.agrees, len(fake.requests)) == ("b", True, 2)
    path, key, body = fake.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sk-very-secret", "some-model")
    asked = body["messages"][1]["content"]
    assert "likes cats" in asked
    assert "bark" in asked
    assert "secret-id" not in json.dumps(body)


def test_a_judge_who_always_says_a_makes_ties(endpoint):
    (ruling,) = judge_pair(judge_at(endpoint(lambda *_: completion("A"))), [Question("say", PERSON, "woof", "purr")])
    assert (ruling.verdict, ruling.agrees) == ("tie", False)


@pytest.mark.parametrize(
    ("reply", "verdict"), [("a", "a"), (" **B** .", "b"), ("Tie", "tie"), ("<think>A or B?</think>\nB", "b")]
)
def test_a_word_is_read_as_it_is_meant(reply, verdict):
    assert openai_chat.verdict_in(reply) == verdict


@pytest.mark.parametrize("reply", ["", "Both are fine", "A B", "Answer C", "<think>A", "tied"])
def test_what_is_no_verdict_is_an_error(reply):
    with pytest.raises(JudgeError):
        openai_chat.verdict_in(reply)


@pytest.mark.parametrize(
    "body", ["", "no json", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}']
)
def test_a_malformed_answer_is_an_error_and_no_tie(endpoint, body):
    (ruling,) = judge_pair(judge_at(endpoint(lambda *_: (200, body))), [Question("say", PERSON, "x", "y")])
    assert (ruling.verdict, ruling.error) == (None, "the reply is no chat completion with a text")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(endpoint, status):
    fake = endpoint(lambda question, number: (status, "busy") if number < 3 else likes_cats(question, number))
    assert judge_at(fake).judge("say", PERSON, "purr", "x") == "a"
    assert len(fake.requests) == 3


def test_a_busy_endpoint_is_an_error_after_the_last_attempt(endpoint):
    fake = endpoint(lambda *_: (503, "busy"))
    with pytest.raises(JudgeError, match="status 503"):
        judge_at(fake, retries=2).judge("say", PERSON, "x", "y")
    assert len(fake.requests) == 3


def test_silence_is_an_error_after_the_timeout(endpoint):
    fake = endpoint(lambda *_: 1.0)
    with pytest.raises(JudgeError, match=r"no reply within 0\.2 s"):
        judge_at(fake, timeout=0.2, retries=1).judge("say", PERSON, "x", "y")


def test_an_unreachable_endpoint_is_given_up_after_a_while(endpoint):
    judge = judge_at(endpoint(likes_cats), base_url="http://127.0.0.1:9", retries=0, workers=1)
    errors = [ruling.error for ruling in judge_pair(judge, [Question("say", PERSON, "x", "y")] * 15)]
    assert errors[:10] == ["the endpoint cannot be reached (ConnectError)"] * 10
    assert set(errors[10:]) == {"not asked any more, after 10 failures one after the other"}


def test_a_refused_key_stops_all_and_is_not_told(endpoint):
    fake = endpoint(lambda *_: (401, json.dumps({"error": {"message": "wrong key"}})))
    with pytest.raises(ConfigurationError, match="status 401: wrong key") as found:
        judge_pair(judge_at(fake), [Question("say", PERSON, "x", "y")] * 9)
    assert "sk-very-secret" not in str(found.value)


def test_one_question_that_is_refused_is_one_error(endpoint):
    fake = endpoint(lambda q, n: (400, '{"error": "too long"}') if "x" in q["A"] + q["B"] else likes_cats(q, n))
    rulings = judge_pair(judge_at(fake), [Question("say", PERSON, "x", "y"), Question("say", PERSON, "purr", "y")])
    assert [(one.verdict, one.error) for one in rulings] == [(None, "status 400: too long"), ("a", "")]


def test_without_a_key_it_says_where_one_is_looked_for(monkeypatch):
    monkeypatch.delenv("KEY", raising=False)
    with pytest.raises(ConfigurationError, match="variable KEY"):
        OpenAIJudge("m", api_key_env="KEY").prepare(None)
    OpenAIJudge("m", api_key_env=None).prepare(None)
