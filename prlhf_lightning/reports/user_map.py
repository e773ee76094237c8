"""A map of users by the principal components of their soft prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import Users

_BATCH = 256


@dataclass(frozen=True)
class UserMap:
    """Users on a plane.

    Attributes:
        rows: `[U]` their rows of the user table.
        points: `[U, 2]` their coordinates.
        generic: `[2]` coordinates of the generic user.
        explained: Share of the vectors' variance that each axis explains.
        clusters: `[U]` the prompt with each user's largest share, for models with shared prompts.
    """

    rows: Tensor
    points: Tensor
    generic: Tensor
    explained: tuple[float, float]
    clusters: Tensor | None


@torch.no_grad()
def user_vectors(module: PersonalizedModel, rows: Tensor) -> Tensor:
    """Return the soft prompts of users without texts, `[U, T * d]` float32 on the CPU.

    Args:
        module: A trained model.
        rows: `[U]` rows of its user table.
    """
    parts = [module.user_model(Users(part.to(module.device))).vectors for part in torch.split(rows, _BATCH)]
    return torch.cat([part.flatten(1).float().cpu() for part in parts])


def map_users(module: PersonalizedModel, rows: Tensor) -> UserMap | None:
    """Return a map of users by the first two principal components of their vectors.

    Args:
        module: A trained model.
        rows: `[U]` rows of its user table, without the generic user's.

    Returns:
        The map, or None if there are fewer than three users or all have the same vectors.
    """
    if not module.user_model.row_tables() or len(rows) < 3:
        return None
    vectors = user_vectors(module, rows)
    mean = vectors.mean(0)
    # With more dimensions than users, the Gram matrix [U, U] has the same principal components.
    centered = (vectors - mean).double()
    values, sides = torch.linalg.eigh(centered @ centered.T)
    values, sides = values.flip(0).clamp(min=0), sides.flip(1)
    if values[0] <= 1e-12 * vectors.double().square().sum():
        return None
    points = sides[:, :2] * values[:2].sqrt()
    directions = centered.T @ sides[:, :2] / values[:2].sqrt().clamp(min=1e-12)
    generic = (user_vectors(module, torch.zeros(1, dtype=torch.long)).double() - mean) @ directions
    shares = values[:2] / values.sum()
    tables = module.user_model.share_tables()
    clusters = tables[0].detach().cpu()[rows].argmax(1) if tables else None
    return UserMap(rows, points.float(), generic[0].float(), (float(shares[0]), float(shares[1])), clusters)


def most_unlike(vectors: Tensor, count: int) -> list[int]:
    """Return users who differ much: the first, then repeatedly the one farthest from those chosen.

    Args:
        vectors: `[U, n]` a vector of each.
        count: Number of users.
    """
    taken = [0] if len(vectors) else []
    while 0 < len(taken) < min(count, len(vectors)):
        distances = torch.cdist(vectors, vectors[taken]).min(1).values
        distances[taken] = -1.0
        taken.append(int(distances.argmax()))
    return taken
