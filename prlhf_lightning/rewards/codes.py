"""Users' codes, estimated from their judgments alone, before a policy is trained.

A few dozen pairs of a user say little about a whole soft prompt, and a policy that is trained together with its users'
codes fits their noise. So codes are taken from a reward model that all users share: low-rank heads (see `fitting`) on
features of words, which need no pretrained model.

Shapes: N pairs, U users, k dimensions of a code, K directions of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prlhf_lightning.rewards.features import FeatureMap, TextFeatures
from prlhf_lightning.rewards.fitting import (
    PRECISIONS,
    FittedHead,
    IndexedPairs,
    fit_codes,
    fit_head,
    held_out_likelihoods,
    steps_in_all,
    steps_of_trial,
)
from prlhf_lightning.rewards.pairs import JudgedPairs, TextTable
from prlhf_lightning.rewards.word_features import WordFeatures
from prlhf_lightning.user_models.base import UserCodes

#: Directions of the fit. Its first 8 are better than the 8 of a fit of 8.
_DIRECTIONS = 32
_STEPS = 20  # of a code, from the prior
#: Users and pairs that the shared part is fitted to, and users whose codes are computed at once: they bound memory.
_USERS, _PAIRS = 1 << 13, 1 << 20
#: Steps of an estimate.
STEPS = steps_in_all(True) + steps_of_trial()


def estimate_codes(
    pairs: JudgedPairs, rows: Tensor, num_users: int, rank: int, report: Callable[[int], None] = lambda step: None
) -> UserCodes:
    """Return users' codes. Deterministic; time and memory of the fit are limited, also for millions of users.

    Args:
        pairs: What users judged.
        rows: `[N]` int64 row of each pair's user, below `num_users`.
        num_users: U.
        rank: k.
        report: Called after each of `STEPS` steps of the fit.
    """
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=num_users)
    blocks = _blocks_of_users(counts)
    learned = order if len(blocks) == 1 else order[torch.isin(rows[order], _sample(counts))]
    found = _Shared.fit(pairs.select(learned), rows[learned], rank, report)
    mean, std = torch.zeros(num_users, rank), torch.ones(num_users, rank)
    ends = counts.cumsum(0)
    for block in blocks:
        here = order[int(ends[block.start] - counts[block.start]) : int(ends[block.stop - 1])]
        if len(here):
            own_mean, own_std = found.codes(pairs.select(here), rows[here] - block.start, len(counts[block]))
            judged = counts[block] > 0
            size = own_mean.shape[1]
            mean[block, :size] = torch.where(judged[:, None], own_mean, 0.0)
            std[block, :size] = torch.where(judged[:, None], own_std, 1.0)
    return UserCodes(mean, std, found.explained)


def _blocks_of_users(counts: Tensor) -> list[slice]:
    """Return ranges of users, each with a limited number of users and of pairs (or with one user)."""
    blocks, start, pairs = [], 0, 0
    for user, count in enumerate(counts.tolist()):
        if user > start and (user - start == _USERS or pairs + count > _PAIRS):
            blocks.append(slice(start, user))
            start, pairs = user, 0
        pairs += count
    return [*blocks, slice(start, len(counts))]


def _sample(counts: Tensor) -> Tensor:
    """Return users drawn at random, within the limits."""
    users = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))[:_USERS]
    kept: Tensor = users[: max(1, int((counts[users].cumsum(0) <= _PAIRS).sum()))]
    return kept


@dataclass(frozen=True)
class _Shared:
    """What all users share.

    Attributes:
        words: Maps tokens to features of words.
        features: Maps these to features of texts.
        weights: `[D, 1 + K]` generic weights and directions.
        turn: `[K, k]` maps codes in these directions to the codes that are asked for.
        explained: See `UserCodes`.
    """

    words: WordFeatures
    features: FeatureMap
    weights: Tensor
    turn: Tensor
    explained: float

    @classmethod
    def fit(cls, pairs: JudgedPairs, rows: Tensor, rank: int, report: Callable[[int], None]) -> _Shared:
        """Return the shared part that is fitted to pairs of users with these rows, `[N]`."""
        words = WordFeatures.fit(*_tokens(pairs.texts))
        features = FeatureMap.fit(words(*_tokens(pairs.texts)), pairs)
        found = cls(words, features, torch.empty(0), torch.empty(0), 0.0)
        of_texts = found._features(pairs)
        _, users = torch.unique(rows, return_inverse=True)
        indexed = IndexedPairs.weighted(users, pairs.chosen, pairs.rejected, pairs.threshold)
        num_users, directions = int(users.max()) + 1, max(rank, _DIRECTIONS)
        candidates = (*PRECISIONS, math.inf)  # the last without users
        likely = held_out_likelihoods(of_texts, indexed, num_users, directions, candidates, report=report)
        precision = max(PRECISIONS, key=likely.__getitem__) if likely else PRECISIONS[len(PRECISIONS) // 2]
        head = fit_head(of_texts, indexed, num_users, directions, precision, report=report)
        explained = 1 - likely[precision] / min(likely[math.inf], -1e-12) if likely else 0.0
        turn = _turn(head, of_texts, indexed)[:, :rank]
        return replace(found, weights=head.weights, turn=turn, explained=explained)

    @torch.no_grad()
    def codes(self, pairs: JudgedPairs, users: Tensor, num_users: int) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of users' codes, `[n, k]` each."""
        scores = self._features(pairs).scores(self.weights)
        margins = scores[pairs.chosen] - scores[pairs.rejected]
        indexed = IndexedPairs.weighted(users, pairs.chosen, pairs.rejected, pairs.threshold)
        size = len(self.turn)
        start = torch.zeros(num_users, size), torch.eye(size).expand(num_users, size, size)
        codes, covariances = fit_codes(margins[:, 0], margins[:, 1:], indexed, *start, _STEPS)
        variances = ((covariances @ self.turn) * self.turn).sum(1)
        return codes @ self.turn, variances.clamp(min=0).sqrt()

    def _features(self, pairs: JudgedPairs) -> TextFeatures:
        found: TextFeatures = self.features(self.words(*_tokens(pairs.texts)), pairs.texts)
        if pairs.threshold >= 0:
            found.vectors[pairs.threshold] = 0.0  # it has no words
        return found


@torch.no_grad()
def _turn(head: FittedHead, features: TextFeatures, pairs: IndexedPairs) -> Tensor:
    """Return the `[K, K]` map to codes with covariance I over users, the one that moves rewards of texts most first."""
    covariance = (head.codes.T @ head.codes + head.covariances.sum(0)) / len(head.codes)
    root = torch.linalg.cholesky(covariance.double())
    judged = torch.cat([pairs.chosen, pairs.rejected])
    judged = judged[judged != pairs.threshold]  # a user's threshold is no taste
    slopes = features.scores(head.weights[:, 1:])[judged].double() @ root
    slopes -= slopes.mean(0)
    directions = torch.linalg.eigh(slopes.T @ slopes)[1].flip(1)
    turn: Tensor = torch.linalg.solve(root.T, directions)
    return turn.float()


def _tokens(texts: TextTable) -> tuple[Tensor, Tensor]:
    """Return the token ids of all completions, one after the other, and their numbers."""
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *texts.completions])
    return torch.from_numpy(ids), torch.tensor([len(completion) for completion in texts.completions])
