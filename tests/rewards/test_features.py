"""Features of texts."""

import torch

from prlhf_lightning.rewards import FeatureMap, JudgedPairs, TextTable

PROMPTS, TEXTS = 3, 10


def rows():
    """Each of two users judges all texts of each prompt, and one a text that nobody else sees."""
    for user in ("ann", "bob"):
        for prompt in range(PROMPTS):
            for text in range(0, TEXTS, 2):
                ids = {"chosen_ids": [100 + text, 2], "rejected_ids": [101 + text, 2]}
                yield {"user_id": user, "prompt_ids": [1, 10 + prompt], **ids}
    yield {"user_id": "ann", "prompt_ids": [1, 10], "chosen_ids": [7, 2], "rejected_ids": [100, 2]}


def fitted():
    pairs = JudgedPairs.of_rows(rows())
    vectors = torch.randn(len(pairs.texts), 5) + 4
    return pairs, vectors, FeatureMap.fit(vectors, pairs)


def test_each_text_is_in_the_table_once():
    pairs = JudgedPairs.of_rows(rows())
    assert len(pairs.texts) == PROMPTS * TEXTS + 1 == len(set(pairs.texts.keys))
    assert pairs.texts.completions[pairs.chosen[-1]].tolist() == [7, 2]


def test_the_same_completion_of_another_prompt_is_another_text():
    table, index = TextTable.of([([1], [5]), ([2], [5]), ([1], [5])])
    assert len(table) == 2
    assert index.tolist() == [0, 1, 0]


def test_texts_are_numbered_the_same_in_every_process():
    """All texts were judged by as many users: their order is that of the pairs, and not of Python's random hashes."""
    pairs, _, features = fitted()
    order = dict.fromkeys([*pairs.chosen.tolist(), *pairs.rejected.tolist()])
    known = [pairs.texts.keys[text] for text in order if pairs.texts.completions[text].tolist() != [7, 2]]
    assert [bytes(key.tolist()) for key in features.text_keys] == known


def test_vectors_are_centered_on_their_prompt():
    pairs, vectors, features = fitted()
    found = features(vectors, pairs.texts)
    shifted = vectors + 3.0 * found.prompt[:, None]
    again = FeatureMap.fit(shifted, pairs)(shifted, pairs.texts)
    assert torch.allclose(found.vectors, again.vectors, atol=1e-4)


def test_only_texts_of_several_users_have_their_own_part():
    pairs, vectors, features = fitted()
    assert features(vectors, pairs.texts).text.eq(0).nonzero().flatten().tolist() == [int(pairs.chosen[-1])]


def test_a_new_text_of_a_new_prompt_has_the_shared_part_alone():
    _, _, features = fitted()
    table, _ = TextTable.of([([1, 99], [3, 2])])
    dense = features(torch.randn(1, 5), table).dense(torch.tensor([0]))
    assert dense.shape == (1, features.size)
    assert dense[0, 5:].eq(0).all()
    assert dense[0, :5].ne(0).all()
