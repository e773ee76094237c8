"""Users, blends and strengths as weighted soft prompts.

A request has one or more *conditions*, each a soft prompt with a weight. The weights sum to 1, and the logits are the
weighted sum of the conditions' logits.

*Strength* mixes logits, `generic + s * (user - generic)`, as classifier-free guidance does (Ho & Salimans 2022; for
language models Sanchez et al. 2023): a distribution proportional to `p(user)^s * p(generic)^(1 - s)`. The objective
trains both distributions, and their ratio is the effect of the user, so strength scales that ratio. Scaling the vectors
beyond 1 would leave the region that the policy was trained on. The generic user keeps the user's text, as in the
objective's generic term `f_P(u_t, u_0)`: strength scales the learned preferences, not the text. Strength 1 needs no
generic row, strength 0 no other.

A *blend* mixes vectors: users are points in that space, a cluster model's users are blends of vectors already, and a
blend of any number of users costs one row. If users' soft prompts have different lengths, there is no such mean, and
the blend mixes their logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.inference.requests import GenerationRequest
from prlhf_lightning.types import SoftPrompt, Users
from prlhf_lightning.user_models import UserModel


@dataclass(frozen=True)
class Condition:
    """A weighted soft prompt of a request.

    Attributes:
        weight: Weight of its logits; the weights of a request sum to 1.
        vectors: `[T, d]`.
    """

    weight: float
    vectors: Tensor


def knows(vocabulary: UserVocabulary, user: str | Mapping[str, float] | None) -> bool:
    """Return whether a user, or every user of a blend, is known; False without a user."""
    named = [user] if isinstance(user, str) else list(user or ())
    return bool(named) and all(name in vocabulary for name in named)


@torch.no_grad()
def conditions(
    generation: GenerationRequest,
    user_model: UserModel,
    vocabulary: UserVocabulary,
    text: SoftPrompt | None,
    device: torch.device | str = "cpu",
) -> list[Condition]:
    """Return the conditions of a request with nonzero weight.

    Args:
        generation: The request.
        user_model: Maps users to vectors.
        vocabulary: The users' rows.
        text: The embedded text about the user, `[1, L, d]`, or None.
        device: Device of the user model.
    """
    shares = _shares(generation.user, vocabulary)
    strength = generation.strength if user_model.personalizes and set(shares) != {0} else 0.0
    found = []
    if strength != 1:
        (vectors,) = _vectors(user_model.generic, torch.tensor([0], device=device), text)
        found.append(Condition(1.0 - strength, vectors))
    if strength != 0:
        each = _vectors(user_model, torch.tensor(list(shares), device=device), text)
        if len({len(vectors) for vectors in each}) == 1:
            parts = [share * vectors for share, vectors in zip(shares.values(), each, strict=True)]
            found.append(Condition(strength, torch.stack(parts).sum(0)))
        else:
            rows = zip(shares.values(), each, strict=True)
            found += [Condition(strength * share, vectors) for share, vectors in rows]
    return found


def _shares(user: str | Mapping[str, float] | None, vocabulary: UserVocabulary) -> dict[int, float]:
    """Return the share of each row of the user table; shares sum to 1, row 0 is the generic user."""
    blend = {user: 1.0} if isinstance(user, str) else dict(user or {"": 1.0})
    total = math.fsum(blend.values())
    shares: dict[int, float] = {}
    for row, share in zip(vocabulary.rows(list(blend)).tolist(), blend.values(), strict=True):
        shares[row] = shares.get(row, 0.0) + share / total
    return shares


def _vectors(model: Callable[[Users], SoftPrompt], index: Tensor, text: SoftPrompt | None) -> list[Tensor]:
    """Return the vectors `[T_i, d]` of the given user rows, all with the same text."""
    texts = None if text is None else text.select(torch.zeros_like(index))
    return model(Users(index, texts)).unpadded()
