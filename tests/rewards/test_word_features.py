"""Features of texts by their words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prlhf_lightning.rewards import word_features
from prlhf_lightning.rewards.word_features import WordFeatures


def features_of(*texts: list[int], size: int = 8) -> Tensor:
    """The latent features."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.tensor([token for text in texts for token in text])
    return WordFeatures.fit(ids, lengths, size)(ids, lengths)[:, :-1]


def test_texts_that_share_words_are_closer():
    features = features_of([1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 9], [6, 7, 8, 10])
    similar = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert similar[0, 1] > similar[0, 2] + 0.2
    assert similar[2, 3] > similar[1, 3] + 0.2


def test_the_order_of_words_counts():
    features = features_of([1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 7, 8])
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_features_have_a_mean_square_norm_of_one():
    features = features_of([1, 2], [3], [1, 4, 5])
    assert features.shape == (3, 3)
    assert math.isclose(features.square().sum(1).mean(), 1.0, rel_tol=1e-5)


def test_the_last_feature_is_the_standardized_length():
    lengths = torch.tensor([1, 3, 7])
    length = WordFeatures.fit(torch.arange(11), lengths)(torch.arange(11), lengths)[:, -1]
    expected = (lengths + 1).double().log()
    standardized = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(length.double(), 0.3 * standardized, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_inner_products_are_those_of_the_exact_decomposition():
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 30, (12,), generator=draw).tolist() for _ in range(9)]
    whole = features_of(*texts, size=9)  # as many as texts: nothing is lost
    cells, counts = torch.unique(
        torch.stack(
            word_features._ngrams(torch.tensor([token for text in texts for token in text]), torch.tensor([12] * 9))
        ),
        dim=1,
        return_counts=True,
    )
    matrix = torch.zeros(9, word_features._BUCKETS).double().index_put_(tuple(cells), counts.double().sqrt())
    matrix *= (9 / (matrix > 0).sum(0).clamp(min=1)).log().clamp(min=0.05)
    matrix /= matrix.norm(dim=1, keepdim=True)
    torch.testing.assert_close(whole @ whole.T, (matrix @ matrix.T).float(), atol=2e-3, rtol=0)


def test_no_ngram_reaches_into_the_next_text():
    alone = word_features._ngrams(torch.tensor([1, 2]), torch.tensor([2]))
    beside = word_features._ngrams(torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
    assert torch.equal(alone[1], beside[1][beside[0] == 0])
    assert (beside[0] == 1).sum() == 1


def test_features_of_a_text_do_not_depend_on_others():
    texts = [[1, 2, 3], [4, 5], [1, 4, 6, 7]]
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.tensor([token for text in texts for token in text])
    fitted = WordFeatures.fit(ids, lengths)
    torch.testing.assert_close(fitted(torch.tensor([4, 5]), torch.tensor([2]))[0], fitted(ids, lengths)[1])
