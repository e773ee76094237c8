"""How many kinds of users there are, and who stands for each: told by how the model has trained users judge pairs.

U trained users, M pairs, K kinds. A user's judgements are the probabilities with which the first of two completions is
preferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_KINDS = 16
_FOLDS, _DRAWS = 8, 4
_LEARNED = (0.1, 0.3, 0.6)  # shares of the pairs that a new user has given
_CLOSE, _NEGLIGIBLE = 0.03, 0.005
_CLAMP = 1e-3


def choose_kinds(judgements: Tensor, generic: Tensor, most: int = MOST_KINDS, seed: int = 0) -> int:
    """Return how many kinds predict users best who had no part in choosing them.

    Some users are left out at a time, and kinds are chosen among the rest. Judgements of those who were left out are
    drawn; their kind is inferred from a few of these, and the score is the log-likelihood of the others. Too few kinds
    miss tastes, too many make it take longer to find one's own. The smallest number is taken whose score is next to the
    best one: by a standard error over users, by 3% of what kinds gain, or by 0.005 nats a pair. Each kind costs a pass
    over new users' pairs.

    Args:
        judgements: `[U, M]` float64 probabilities of trained users.
        generic: `[M]` those of the generic user.
        most: Most kinds.
        seed: Draws folds, pairs and judgements.
    """
    users, pairs = judgements.shape
    most = min(most, users - -(-users // _FOLDS))
    if most < 2 or pairs < 2:
        return max(1, min(users, most))
    draw = torch.Generator().manual_seed(seed)
    judgements, generic = judgements.clamp(_CLAMP, 1 - _CLAMP), generic.clamp(_CLAMP, 1 - _CLAMP)
    fold = torch.randperm(users, generator=draw) % min(_FOLDS, users)
    orders = torch.stack([torch.randperm(pairs, generator=draw) for _ in range(_DRAWS)])
    answers = torch.rand(_DRAWS, users, pairs, generator=draw, dtype=judgements.dtype) < judgements
    scores = judgements.new_zeros(most, users)
    for part in range(int(fold.max()) + 1):
        rest, out = (fold != part).nonzero().flatten(), (fold == part).nonzero().flatten()
        distances = torch.cdist(judgements[rest], judgements[rest])
        for kinds in range(1, most + 1):
            medoids = medoids_of(distances, kinds)
            sizes = torch.bincount(distances[:, medoids].argmin(1), minlength=kinds).to(judgements)
            weights = torch.cat([sizes.new_ones(1), sizes]) / (1 + len(rest))
            under = torch.cat([generic[None], judgements[rest][medoids]])
            scores[kinds - 1, out] = _predicted(answers[:, out], orders, under, weights)
    behind = scores[int(scores.mean(1).argmax())] - scores
    close = (behind.std(1) / users**0.5).clamp(min=max(_NEGLIGIBLE, _CLOSE * float(behind.mean(1)[0])))
    return 1 + int((behind.mean(1) <= close).nonzero()[0])


def _predicted(answers: Tensor, orders: Tensor, under: Tensor, weights: Tensor) -> Tensor:
    """Return `[B]` the mean log-likelihood of some users' answers, given a few others of theirs.

    Args:
        answers: `[D, B, M]` bool, which completion each of B users prefers, drawn D times.
        orders: `[D, M]` in which the pairs are asked.
        under: `[C, M]` probabilities of each kind.
        weights: `[C]` how likely each kind is.
    """
    logs = torch.stack([(1 - under).log(), under.log()])  # [2, C, M]
    total = under.new_zeros(answers.shape[1])
    for own, order in zip(answers, orders, strict=True):
        found = logs[own.long()[:, order], :, order]  # [B, M, C]
        for share in _LEARNED:
            learned = min(found.shape[1] - 1, max(1, round(share * found.shape[1])))
            posterior = (weights.log() + found[:, :learned].sum(1)).log_softmax(1)
            total += (posterior[:, None] + found[:, learned:]).logsumexp(2).mean(1)
    return total / (len(orders) * len(_LEARNED))


def medoids_of(distances: Tensor, count: int) -> Tensor:
    """Choose users who stand for all: k-medoids, built greedily and improved by swaps (Kaufman and Rousseeuw 1990).

    Args:
        distances: `[U, U]` between users.
        count: K, at most U.
    """
    if not count:
        return torch.zeros(0, dtype=torch.long)
    taken = [int(distances.sum(1).argmin())]
    while len(taken) < count:
        nearest = distances[:, taken].amin(1)
        gains = (nearest[:, None] - distances).clamp(min=0).sum(0)
        gains[taken] = -1
        taken.append(int(gains.argmax()))
    for _ in range(20):
        kind = distances[:, taken].argmin(1)
        members = [(kind == place).nonzero().flatten() for place in range(count)]
        better = [
            int(m[distances[m][:, m].sum(1).argmin()]) if len(m) else t for t, m in zip(taken, members, strict=True)
        ]
        if better == taken:
            break
        taken = better
    return torch.tensor(taken)
