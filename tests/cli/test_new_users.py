"""Users whom a server learns while it runs."""

from __future__ import annotations

from threading import Event

import pytest
import torch
from conftest import WORDS

from prlhf_lightning.cli.serve import NewUsers
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.user_models import AmortizedUserModel, ClusterUserModel, IndividualUserModel

LONG, SHORT = " ".join(WORDS[:6]), " ".join(WORDS[6:8])
PAIRS = [{"user_id": "eve", "prompt": word, "chosen": LONG, "rejected": SHORT} for word in WORDS[:8]]


USER_MODELS = {
    "individual": lambda: IndividualUserModel(2),
    "cluster": lambda: ClusterUserModel(3, 2),
    "amortized": lambda: AmortizedUserModel(2),
}


@pytest.fixture(params=USER_MODELS)
def taught(request, model_path):
    """A writer of users who differ, and what teaches it."""
    module = PersonalizedLM(users := USER_MODELS[request.param](), policy := CausalLMPolicy(model_path), DPOLoss())
    module.vocabulary = UserVocabulary(["ann", "bob", "cy"])
    module.configure_model()
    with torch.no_grad():
        for table in users.row_tables():
            table[1:] += torch.randn_like(table[1:])
    writer = Generator(policy.lm, policy.tokenizer, users, module.vocabulary)
    return writer, NewUsers(module.eval(), writer)


def rows(writer):
    return [table.detach().clone() for table in writer.user_model.row_tables()]


def test_a_new_user_is_known_afterwards_and_nobody_else_changes(taught):
    writer, learn = taught
    asked = [GenerationRequest(word, user) for word in WORDS[:3] for user in ("ann", "cy", None)]
    before, texts = rows(writer), [done.text for done in writer.generate(asked)]
    learn("eve", PAIRS)
    assert "eve" in writer.vocabulary
    assert all(torch.equal(old, new[: len(old)]) for old, new in zip(before, rows(writer), strict=True))
    assert [done.text for done in writer.generate(asked)] == texts
    assert any(not torch.equal(table[-1], table[0]) for table in rows(writer))
    assert writer.generate([GenerationRequest("a", "eve")])[0].known_user


def test_learning_again_starts_anew(taught):
    writer, learn = taught
    learn("eve", PAIRS)
    first = rows(writer)
    turned = [pair | {"chosen": SHORT, "rejected": LONG} for pair in PAIRS]
    learn("eve", turned)
    assert any(not torch.equal(a, b) for a, b in zip(first, rows(writer), strict=True))
    learn("eve", PAIRS)
    assert all(torch.equal(a, b) for a, b in zip(first, rows(writer), strict=True))
    assert writer.vocabulary.ids == ("ann", "bob", "cy", "eve")


def test_users_of_training_are_not_learned_anew(taught):
    _, learn = taught
    with pytest.raises(ConfigurationError, match="trained on this user"):
        learn("ann", PAIRS)


def test_texts_are_not_kept(taught):
    _, learn = taught
    learn("eve", PAIRS)
    assert len(learn._tokenize._ids) == 1  # the empty text


def test_texts_written_while_a_user_is_learned_are_the_same(taught):
    writer, learn = taught
    learn("eve", PAIRS)
    row = [table[-1].clone() for table in rows(writer)]
    asked = [GenerationRequest(word, user, max_new_tokens=4) for word in WORDS[:3] for user in ("ann", None)]
    texts, written = [done.text for done in writer.generate(asked)], []
    learn("eve", PAIRS, lambda: written.append([done.text for done in writer.generate(asked)]))
    assert written
    assert all(found == texts for found in written)
    assert all(torch.equal(old, table[-1]) for old, table in zip(row, rows(writer), strict=True))


def test_others_go_on_while_pairs_are_tokenized(taught, monkeypatch):
    _, learn = taught
    went_on = Event()
    tokenize = FeedbackTokenizer.__call__

    def slowly(self, records, wheres):
        assert went_on.wait(5)
        return tokenize(self, records, wheres)

    monkeypatch.setattr(FeedbackTokenizer, "__call__", slowly)
    learn("eve", PAIRS, went_on.set)
