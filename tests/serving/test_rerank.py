"""The route that ranks answers for a user."""

from hashlib import sha256

import pytest
from serving_helpers import EchoEngine, LengthScorer, ranker, writer
from starlette.testclient import TestClient

from prlhf_lightning.serving.app import create_app
from prlhf_lightning.serving.auth import APIKey, KeyRing
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.serving.services import Ranker, Services

DOCUMENTS = ["sun red", {"text": "moon"}, "dog ran fast"]


def client(**services):
    app = create_app(Services(writer(), EchoEngine, hosts=None, **{"ranker": ranker(), **services}))
    return TestClient(app, base_url="http://localhost")


def rerank(server, **fields):
    headers = {"Authorization": "Bearer open"}
    return server.post("/v1/rerank", json={"query": "the cat", "documents": DOCUMENTS, **fields}, headers=headers)


@pytest.mark.parametrize(("user", "status"), [("ann", "known"), ("nobody", "unknown"), (None, "none")])
def test_documents_are_ordered_by_the_rewards_for_the_user(user, status):
    texts = ["sun red", "moon", "dog ran fast"]
    rewards = LengthScorer().score([user or ""] * 3, ["the cat"] * 3, texts).tolist()
    found = rerank(client(), user=user, return_documents=True).json()
    assert [one["index"] for one in found["results"]] == sorted(range(3), key=lambda n: -rewards[n])
    assert all(one["relevance_score"] == rewards[one["index"]] for one in found["results"])
    assert all(one["document"]["text"] == texts[one["index"]] for one in found["results"])
    assert found["personalization"]["status"] == status
    assert found["usage"]["total_tokens"] == 21


def test_the_best_alone_come_without_their_texts():
    (one,) = rerank(client(), user="ann", top_n=1).json()["results"]
    assert set(one) == {"index", "relevance_score"}
    assert one["index"] == 2


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"documents": ["sun", "refuse"]}, 400, "documents.1"),
        ({"documents": []}, 400, "documents"),
        ({"query": [{"role": "assistant", "content": "hi"}]}, 400, "query"),
        ({"model": "other"}, 404, "model"),
        ({"user": "eve"}, 403, "user"),
        ({"documents": ["x" * 100]}, 413, "documents"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(fields, status, param):
    keys = KeyRing([APIKey("all", sha256(b"open").hexdigest(), "a*")])
    found = rerank(client(keys=keys, limits=Limits(max_prompt=50)), **fields)
    assert (found.status_code, found.json()["error"]["param"]) == (status, param)


def test_what_was_ranked_is_counted_and_the_model_is_listed():
    server = client()
    rerank(server, user="nobody")
    counted = server.get("/metrics").text
    assert "prlhf_ranked_documents_total 3.0" in counted
    assert "prlhf_unknown_users_total 1.0" in counted
    assert [one["id"] for one in server.get("/v1/models").json()["data"]] == ["echo", "echo-reward"]


def test_a_failing_reward_model_fails_its_request_alone():
    class Broken(LengthScorer):
        def scored_records(self, records, wheres):
            if len(records) == 1:
                raise RuntimeError
            return super().scored_records(records, wheres)

    app = create_app(Services(writer(), EchoEngine, ranker=Ranker("r", Broken())))
    server = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    assert rerank(server, documents=["sun"]).status_code == 500
    assert rerank(server).status_code == 200


def test_without_a_reward_model_there_is_no_route():
    assert rerank(client(ranker=None)).status_code == 404
