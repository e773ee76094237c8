from __future__ import annotations

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models import (
    AmortizedUserModel,
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UniformUserModel,
    UserModel,
)

VOCABULARY = torch.randn(20, 8) * 0.02
IMPLICIT = [
    UniformUserModel(num_tokens=3),
    IndividualUserModel(num_tokens=3),
    ClusterUserModel(num_clusters=4, num_tokens=3),
    LowRankUserModel(num_tokens=3, rank=2),
    AmortizedUserModel(num_tokens=3, rank=2),
    CompositeUserModel([ClusterUserModel(2, 1), IndividualUserModel(2)]),
]


def built(model: UserModel, num_rows: int = 5) -> UserModel:
    model.build(num_rows, VOCABULARY)
    for param in model.row_tables():
        torch.nn.init.normal_(param.data[1:])  # users who have learned something; the generic row as it starts
    return model


def users(*rows: int, text: SoftPrompt | None = None) -> Users:
    return Users(torch.tensor(rows), text)


@pytest.mark.parametrize("model", IMPLICIT, ids=lambda m: type(m).__name__)
def test_generic_prompt_is_the_unknown_users_prompt_exactly(model):
    built(model)
    generic = model.generic(users(1, 4))
    assert torch.equal(generic.vectors, model(users(0, 0)).vectors)
    assert generic.vectors.shape == (2, 3, 8)
    assert generic.mask.all()


@pytest.mark.parametrize("model", IMPLICIT[1:], ids=lambda m: type(m).__name__)
def test_users_differ_from_each_other_and_the_generic_user(model):
    prompts = built(model)(users(0, 1, 2)).vectors
    assert not torch.allclose(prompts[0], prompts[1])
    assert not torch.allclose(prompts[1], prompts[2])


@pytest.mark.parametrize("model", IMPLICIT, ids=lambda m: type(m).__name__)
def test_a_fresh_user_starts_as_the_generic_user(model):
    model.build(5, VOCABULARY)
    prompts = model(users(0, 3)).vectors
    assert torch.equal(prompts[0], prompts[1])


@pytest.mark.parametrize("model", IMPLICIT[:2], ids=lambda m: type(m).__name__)
def test_vectors_start_at_word_vectors(model):
    model.build(5, VOCABULARY)
    vectors = model(users(0)).vectors[0]
    assert all(any(torch.equal(vector, word) for word in VOCABULARY) for vector in vectors)


def test_low_rank_directions_are_orthogonal_at_word_distance():
    model = LowRankUserModel(num_tokens=3, rank=2)
    model.build(5, VOCABULARY)
    square = VOCABULARY.std() ** 2 * 3 * 8
    torch.testing.assert_close(model.basis @ model.basis.T, square * torch.eye(2))


def test_a_rank_above_the_size_of_the_prompt_is_refused():
    with pytest.raises(ConfigurationError, match="rank is 25; it must be at most"):
        LowRankUserModel(num_tokens=3, rank=25).build(5, VOCABULARY)


def test_more_vectors_than_words_can_be_started():
    model = ClusterUserModel(num_clusters=30, num_tokens=10)
    model.build(5, VOCABULARY)
    assert model.prompts.shape == (30, 10, 8)


def test_individual_prompt_is_generic_plus_offset():
    model = built(IndividualUserModel(num_tokens=3))
    expected = model.generic_prompt + model.offsets.weight[2].view(3, 8)
    assert torch.equal(model(users(2)).vectors[0], expected)


def test_cluster_prompt_is_the_softmax_weighted_mean():
    model = built(ClusterUserModel(num_clusters=4, num_tokens=3))
    shares = model.weights.weight[2].exp() / model.weights.weight[2].exp().sum()
    expected = sum(share * prompt for share, prompt in zip(shares, model.prompts, strict=True))
    torch.testing.assert_close(model(users(2)).vectors[0], expected)


@pytest.mark.parametrize("model", IMPLICIT[1:], ids=lambda m: type(m).__name__)
def test_gradient_touches_only_the_rows_of_users_present(model):
    built(model)
    model(users(1, 3, 3)).vectors.square().sum().backward()
    for table in model.row_tables():
        assert table.grad.is_sparse
        assert table.grad.coalesce().indices().tolist() == [[1, 3]]


def test_text_is_passed_on_and_seen_by_the_reference():
    model = TextUserModel()
    model.build(5, VOCABULARY)
    text = SoftPrompt(torch.randn(2, 4, 8), torch.tensor([[True] * 4, [False] * 4]))
    asked = users(1, 2, text=text)
    assert model(asked) is text
    assert model.reference(asked) is text
    assert model(users(1, 2)).vectors.shape == (2, 0, 8)


def test_the_reference_sees_only_the_explicit_part_of_composite():
    model = built(CompositeUserModel([IndividualUserModel(3), TextUserModel()]))
    text = SoftPrompt(torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, False, False, False]]))
    asked = users(1, 2, text=text)
    prompt = model(asked)
    assert prompt.vectors.shape == (2, 7, 8)
    assert prompt.mask.sum(1).tolist() == [7, 4]
    assert torch.equal(prompt.vectors[:, 3:], text.vectors)
    assert model.reference(asked) is text
    assert torch.equal(model.generic(asked).vectors[:, 3:], text.vectors)  # the generic term keeps the text


def test_implicit_models_show_the_reference_nothing():
    assert built(IndividualUserModel(3)).reference(users(1)) is None


@pytest.mark.parametrize(
    ("user_model", "settings", "says"),
    [
        (UniformUserModel, {"num_tokens": -1}, "UniformUserModel: num_tokens is -1; it must be 0 or more"),
        (IndividualUserModel, {"num_tokens": 0}, "IndividualUserModel: num_tokens is 0; it must be 1 or more"),
        (ClusterUserModel, {"num_tokens": 0}, "ClusterUserModel: num_tokens is 0"),
        (ClusterUserModel, {"num_clusters": 0}, "ClusterUserModel: num_clusters is 0"),
        (LowRankUserModel, {"rank": 0}, "LowRankUserModel: rank is 0; it must be 1 or more"),
        (CompositeUserModel, {"parts": []}, "CompositeUserModel: parts is empty"),
    ],
)
def test_impossible_settings_are_refused_by_name(user_model, settings, says):
    with pytest.raises(ConfigurationError, match=says):
        user_model(**settings)
