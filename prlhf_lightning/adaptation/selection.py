"""Which pairs to ask a user next: those whose answers would tell most."""

from __future__ import annotations

import torch
from torch import Tensor

from prlhf_lightning.adaptation.adapt import Adapted
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.types import PreferenceBatch


def information_gain(weights: Tensor, margins: Tensor) -> Tensor:
    """Return how many bits an answer tells of the user's kind on average: BALD (arXiv:1112.5745, Eq. 2).

    Args:
        weights: `[B, C]` probability of each kind.
        margins: `[N, C]` reward margin of each pair under it.

    Returns:
        `[B, N]` mutual information between answer and kind, at least 0 and at most 1.
    """
    chances = margins.sigmoid()
    return (_bits(weights @ chances.T) - weights @ _bits(chances).T).clamp(min=0)


def suggest(model: PersonalizedLM, adapted: Adapted, pool: PreferenceBatch, count: int) -> tuple[Tensor, Tensor]:
    """Choose pairs of a pool to ask each user, the most telling first.

    Args:
        model: The model that the users were adapted to.
        adapted: What is known of B users; with no pairs yet, what is known of anyone.
        pool: M pairs whose order means nothing. One or two passes of the policy a kind score them for all users.
        count: Pairs wanted a user; fewer where the pool is smaller.

    Returns:
        `[B, n]` places in the pool, and `[B, n]` the bits that each tells.
    """
    margins_of = Margins(model, pool)
    prior = adapted.prior
    under = torch.stack([margins_of(prior.rows(centre)) for centre in prior.centres], dim=1)
    found = information_gain(adapted.weights, under).topk(min(count, len(pool)), dim=1)
    return found.indices, found.values


def _bits(chance: Tensor) -> Tensor:
    """Entropy of a yes or no."""
    chance = chance.clamp(1e-7, 1 - 1e-7)
    return -(chance * chance.log2() + (1 - chance) * (1 - chance).log2())
