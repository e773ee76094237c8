"""The OpenAPI document says what the server does: requests and answers of every kind are held against it."""

from __future__ import annotations

from hashlib import sha256

import pytest
import schemathesis
from conftest import CHAT_TEMPLATE
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_helpers import EchoEngine, ranker, serving, writer

from prlhf_lightning.data.feedback_log import FeedbackLog
from prlhf_lightning.serving.app import create_app
from prlhf_lightning.serving.auth import APIKey, KeyRing
from prlhf_lightning.serving.services import Services

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/rerank", "/v1/users", "/v1/models/{name}"]
ROUTES += ["/readyz"]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    log = FeedbackLog(str(tmp_path_factory.mktemp("log") / "feedback.db"))
    keys = KeyRing([APIKey("all", sha256(b"open").hexdigest())])
    with serving(Services(writer(CHAT_TEMPLATE), EchoEngine, log, keys, ranker=ranker())) as url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
        document.config.generation.with_security_parameters = False  # the key is given below
        yield document


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("route", ROUTES)
def test_what_is_documented_is_what_is_done(document, route, mode):
    operations = document[route]
    operation = operations[next(iter(operations))]
    if mode.is_negative and not (operation.body or operation.query):
        pytest.skip("nothing in this request can be wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    def holds(case):
        response = case.call(headers={"Authorization": "Bearer open"})
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        if mode.is_positive and response.status_code not in (404, 409):
            # What no schema can say: a prompt that is an answer already, parameters that exclude one another.
            excused = ("prompt_ends_with_answer", "contradictory_parameters")
            assert response.status_code < 300 or any(code in response.text for code in excused), case.body

    holds()


def test_keys_are_documented_where_there_are_any(document):
    open_to_all = create_app(Services(writer(), EchoEngine)).openapi()
    guarded = document.raw_schema
    assert "security" in guarded["paths"]["/v1/users"]["get"]
    assert "security" not in open_to_all["paths"]["/v1/users"]["get"]
    assert "/v1/feedback" not in open_to_all["paths"]
