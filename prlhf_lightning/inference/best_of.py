"""Best-of-n: several answers to one request, of which the one with the highest reward for the user is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from prlhf_lightning.data.records import Text
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference.generator import Generator
from prlhf_lightning.inference.requests import MOST_SEED, Completion, GenerationRequest

_AT_ONCE = 64  # requests that are scored together


class Scores(Protocol):
    """Gives texts rewards for users, as `training.reward_scorer` does."""

    def score(
        self,
        user_ids: Sequence[str],
        prompts: Sequence[Text],
        completions: Sequence[Text],
        user_texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the rewards `[n]` of n texts; NaN for a text that has none. An empty id is the generic user."""


@dataclass(frozen=True)
class Candidates:
    """N answers to one request.

    Attributes:
        request: What was asked.
        answers: The answers, in the order of their seeds.
        rewards: `[N]` float64; NaN for answers without a reward: blank ones, and those that the scorer refuses.
    """

    request: GenerationRequest
    answers: tuple[Completion, ...]
    rewards: Tensor

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each answer, `[N]` int64."""
        return torch.tensor([answer.completion_tokens for answer in self.answers])

    @property
    def best(self) -> int:
        """Number of the answer with the highest reward, the first of several; 0 if none has a reward."""
        return int(self.rewards.nan_to_num(-math.inf).argmax())


def sample_candidates(
    writer: Generator, scorer: Scores, requests: Iterable[GenerationRequest], n: int, max_batch_rows: int = 64
) -> Iterator[tuple[int, Candidates]]:
    """Yield the number of each request and its answers with their rewards, as soon as they are finished.

    Answer i has the seed `candidate_seed(request.seed, i)`. So the first n of N answers are the n answers, and answers
    do not depend on other requests. The reward for a blend of users is the weighted mean of the users' rewards, as for
    blended heads.

    Args:
        writer: The model that writes.
        scorer: Gives rewards.
        requests: What is asked; read only as far as the batch needs.
        n: Number of answers to each.
        max_batch_rows: Maximum number of rows in a step.

    Raises:
        ConfigurationError: A request is greedy, so that its answers would be equal.
    """
    asked: dict[int, GenerationRequest] = {}
    unfinished: dict[int, dict[int, Completion]] = {}

    def each() -> Iterator[GenerationRequest]:
        for place, request in enumerate(requests):
            check_sampled(n, request.temperature)
            asked[place] = request
            unfinished[place] = {}
            for number in range(n):
                yield replace(request, seed=candidate_seed(request.seed, number))

    finished: list[int] = []
    for place, completion in writer.as_finished(each(), max_batch_rows):
        request, number = divmod(place, n)
        unfinished[request][number] = completion
        if len(unfinished[request]) == n:
            finished.append(request)
        if len(finished) == _AT_ONCE:
            yield from _scored(scorer, finished, asked, unfinished)
            finished = []
    yield from _scored(scorer, finished, asked, unfinished)


def check_sampled(n: int, temperature: float) -> None:
    """Check the number of answers to a request.

    Raises:
        ConfigurationError: It is below 1, or the answers would all be equal.
    """
    if n < 1:
        raise ConfigurationError(f"The number of answers is {n}; it must be 1 or more.")
    if n > 1 and temperature == 0:
        raise ConfigurationError(
            f"temperature is 0, so all {n} answers to a prompt would be equal; set a temperature above 0, such as 1."
        )


def candidate_seed(seed: int | None, number: int) -> int | None:
    """Return the seed of an answer: the request's own for the first, and a hash of seed and number for others."""
    return seed if seed is None or number == 0 else hashed_seed(seed, number)


def hashed_seed(*parts: object) -> int:
    """Return a seed that depends on all parts."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) % MOST_SEED


def expected_best(rewards: Tensor) -> Tensor:
    """Return unbiased estimates of the expected best of n rewards, for n = 1, ..., N.

    With sorted rewards `r_1 <= ... <= r_N`, `r_i` is the best of `C(i-1, n-1)` of the `C(N, n)` subsets of size n, so
    the estimate is `sum_i C(i-1, n-1) / C(N, n) r_i` (WebGPT, arXiv:2112.09332, Appendix I).

    Args:
        rewards: `[..., N]` rewards of independent samples, in any order.

    Returns:
        `[..., N]` float64; the last is the maximum, the first the mean.
    """
    count = rewards.shape[-1]
    weights = [
        [math.comb(i - 1, n - 1) / math.comb(count, n) for n in range(1, count + 1)] for i in range(1, count + 1)
    ]
    return rewards.double().sort(-1).values @ torch.tensor(weights, dtype=torch.float64, device=rewards.device)


def kl_bound(n: int) -> float:
    """Return `log n - (n - 1) / n`: an upper bound of the KL divergence of best-of-n from its policy, in nats.

    It is exact if no two answers are ever equal (arXiv:2009.01325, Appendix G.3; that it is a bound is proved in
    arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def length_correlation(rewards: Iterable[Tensor], lengths: Iterable[Tensor]) -> float:
    """Return the correlation of reward and length within the answers to a request; NaN if one of them never varies.

    Differences between prompts and users do not count. A high value warns that the reward favors long (or, below 0,
    short) answers.

    Args:
        rewards: `[n]` rewards of the answers to each request; NaN is ignored.
        lengths: `[n]` their lengths, in any unit.
    """
    centered = [torch.zeros(2, 0, dtype=torch.float64)]
    for one, length in zip(rewards, lengths, strict=True):
        both = torch.stack([one.double(), length.double()])[:, ~one.isnan()]
        centered.append(both - both.mean(1, keepdim=True) if both.shape[1] else both)
    reward, length = torch.cat(centered, 1)
    return float((reward * length).sum() / (reward.norm() * length.norm()))


def _scored(
    scorer: Scores,
    places: Sequence[int],
    asked: dict[int, GenerationRequest],
    finished: dict[int, dict[int, Completion]],
) -> Iterator[tuple[int, Candidates]]:
    """Yield requests with their rewards, and forget them."""
    texts: list[tuple[str, Text, str, str]] = []
    parts: list[tuple[int, int, float]] = []  # request, answer and share of each text
    rewards: dict[int, Tensor] = {}
    for place in places:
        request, answers = asked[place], finished[place]
        rewards[place] = torch.zeros(len(answers), dtype=torch.float64)
        for number, answer in answers.items():
            if not answer.text.strip():
                rewards[place][number] = math.nan
                continue
            for user, share in _shares(request.user).items():
                texts.append((user, request.prompt, answer.text, request.user_text))
                parts.append((place, number, share))
    if texts:
        found = scorer.score(*(list(column) for column in zip(*texts, strict=True))).tolist()
        for (place, number, share), reward in zip(parts, found, strict=True):
            rewards[place][number] += share * reward
    for place in places:
        answers = finished.pop(place)
        ordered = tuple(answers[number] for number in range(len(answers)))
        yield place, Candidates(asked.pop(place), ordered, rewards[place])


def _shares(user: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return the users of a request and their shares, which sum to 1."""
    if user is None or isinstance(user, str):
        return {user or "": 1.0}
    total = sum(user.values())
    return {name: share / total for name, share in user.items()}
