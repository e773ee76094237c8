"""Best-of-n and pairs of samples, against enumeration and rewards known by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from test_engine import make_writer

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Completion, GenerationRequest
from prlhf_lightning.inference.best_of import (
    Candidates,
    expected_best,
    kl_bound,
    length_correlation,
    sample_candidates,
)
from prlhf_lightning.inference.sampled_pairs import pair_of

NAN = math.nan


class LikesTokens:
    """Rewards by user: ann likes many words, bob few."""

    def score(self, user_ids, prompts, completions, user_texts=None):
        signs = [{"ann": 1, "bob": -2}.get(user, 0) for user in user_ids]
        return torch.tensor([sign * len(text.split()) for sign, text in zip(signs, completions, strict=True)])


@pytest.fixture(scope="module")
def writer(model_paths):
    return make_writer(model_paths["llama"])[0]


def request(user="ann", prompt="the cat", **how):
    return GenerationRequest(prompt, user, **{"max_new_tokens": 6, "temperature": 1.0, "seed": 3, **how})


def sampled(writer, requests, n, **how):
    return [one for _, one in sorted(sample_candidates(writer, LikesTokens(), requests, n, **how))]


def test_expected_best_is_the_mean_over_all_subsets():
    rewards = torch.randn(3, 7).double()
    for n in range(1, 8):
        over_subsets = torch.stack([rewards[:, list(chosen)].max(1).values for chosen in combinations(range(7), n)])
        torch.testing.assert_close(expected_best(rewards)[:, n - 1], over_subsets.mean(0))


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_kl_bound_is_reached_with_many_answers(n):
    def divergence(answers):  # of best-of-n from a uniform policy over answers with different rewards
        below = torch.arange(answers + 1, dtype=torch.float64) / answers
        best = (below**n).diff()
        return float((best * (best * answers).log()).nansum())

    assert all(divergence(answers) <= kl_bound(n) + 1e-12 for answers in (1, 2, 3, 10))
    assert divergence(100_000) == pytest.approx(kl_bound(n), abs=1e-3)


def test_length_correlation_ignores_the_prompt():
    rewards = torch.randn(2, 5).double()
    lengths = torch.stack([rewards[0] * 3 + 1, rewards[1] * 3 + 100])
    assert length_correlation(rewards, lengths) == pytest.approx(1)
    assert length_correlation(rewards, -lengths) == pytest.approx(-1)
    assert math.isnan(length_correlation([], []))


def test_answers_do_not_depend_on_the_batch(writer):
    asked = [request(user, prompt) for user in ("ann", "bob") for prompt in ("the cat", "a dog ran fast", "no")]
    found = sampled(writer, asked, 5, max_batch_rows=7)
    for one, candidates in zip(asked, found, strict=True):
        (alone,) = sampled(writer, [one], 3)
        assert [each.ids for each in alone.answers] == [each.ids for each in candidates.answers[:3]]
        assert alone.answers[0] == writer.generate([one])[0]
    assert len({each.ids for candidates in found for each in candidates.answers}) > 15


def test_the_best_answer_is_the_one_the_user_likes(writer):
    for candidates in sampled(writer, [request("ann"), request("bob")], 8):
        words = [len(answer.text.split()) for answer in candidates.answers]
        assert len(set(words)) > 1
        wanted = max if candidates.request.user == "ann" else min
        assert words[candidates.best] == wanted(count for count in words if count)
        assert [bool(count) for count in words] == (~candidates.rewards.isnan()).tolist()


def test_a_blend_is_scored_by_the_weighted_mean_of_its_users(writer):
    (candidates,) = sampled(writer, [request({"ann": 3, "bob": 1})], 4)
    words = torch.tensor([float(len(answer.text.split())) for answer in candidates.answers])
    expected = 0.75 * words - 0.25 * 2 * words
    torch.testing.assert_close(candidates.rewards[words > 0], expected[words > 0].double())


def test_answers_to_one_request_compute_its_prompt_once(writer, monkeypatch):
    rows = []
    plain = writer.sequences
    monkeypatch.setattr(writer, "sequences", lambda prompts: rows.append(len(prompts)) or plain(prompts))
    sampled(writer, [request(strength=2.0), request("bob", strength=2.0), request("bob")], 4)
    assert rows == [3]


def test_greedy_answers_are_refused(writer):
    with pytest.raises(ConfigurationError, match="temperature is 0, so all 4 answers to a prompt would be equal"):
        sampled(writer, [request(temperature=0.0)], 4)


def candidates_of(*answers, prompt="p"):
    completions = tuple(Completion(text, (), reason, 1, 2, True) for text, _, reason in answers)
    rewards = torch.tensor([reward for _, reward, _ in answers], dtype=torch.float64)
    return Candidates(GenerationRequest(prompt), completions, rewards)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("a", 1, "stop"), ("b", 3, "stop"), ("c", -2, "stop")], ("b", "c", 5)),
        ([("a", 1, "stop"), ("b", 3, "length"), ("c", -2, "length")], ("a", "c", 3)),
        ([("a", 1, "stop"), ("b", NAN, "stop"), ("c", 2, "stop")], ("c", "a", 1)),
        ([("a", 1, "stop"), ("b", 3, "length")], "max_new_tokens cut off the better answers"),
        ([("a", 1, "stop"), ("b", 1, "stop")], "tie"),
        ([("a", 1, "stop"), ("a", 1, "stop")], "all answers are equal"),
        ([("a", 1, "length"), ("b", 2, "length")], "max_new_tokens cut off every answer"),
        ([("a", NAN, "stop"), ("b", NAN, "stop")], "no answer has a reward"),
    ],
)
def test_the_best_whole_answer_stands_against_the_worst(answers, expected):
    pair = pair_of(candidates_of(*answers))
    assert (pair if isinstance(pair, str) else (pair.chosen, pair.rejected, pair.margin)) == expected


def test_margins_bound_pairs_and_messages_stay_messages():
    candidates = candidates_of(("a", 1, "stop"), ("b", 2, "stop"), prompt=[{"role": "user", "content": "p"}])
    assert pair_of(candidates, min_margin=1.0) == "tie"
    assert pair_of(candidates, min_margin=0.9).chosen == [{"role": "assistant", "content": "b"}]
