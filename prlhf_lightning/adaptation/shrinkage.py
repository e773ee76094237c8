"""Shrinkage of user rows toward the generic user.

A row that was trained on a few dozen noisy judgments also fits the noise. It then predicts its user's other judgments
worse than it could, or even worse than the generic user. One shrinkage factor for all users is fitted to pairs that
training did not see (James and Stein 1961; here by likelihood, since margins are not Gaussian).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.adaptation.adapt import trained_rows
from prlhf_lightning.adaptation.margins import Margins, row_tables, select_pairs
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import PreferenceBatch

MOST_PAIRS = 4000
FACTORS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Shrinkage:
    """Likelihood and accuracy of held-out pairs for each factor.

    Attributes:
        factors: The F factors; 0 gives the generic user, 1 the unchanged rows.
        log_likelihoods: `[F]` mean over pairs of `log σ(margin)`.
        accuracies: `[F]` share of correctly ranked pairs.
        pairs: Number of pairs.
        tables: Names of the shrunk tables in the user model; tables that are read from pairs do not change.
    """

    factors: tuple[float, ...]
    log_likelihoods: Tensor
    accuracies: Tensor
    pairs: int
    tables: tuple[str, ...]

    @property
    def place(self) -> int:
        """Index of the most likely factor."""
        return int(self.log_likelihoods.argmax())

    @property
    def best(self) -> float:
        """The most likely factor."""
        return self.factors[self.place]


def fit_shrinkage(
    model: PersonalizedModel, pairs: PreferenceBatch, factors: Sequence[float] = FACTORS, most: int = MOST_PAIRS
) -> Shrinkage:
    """Return likelihood and accuracy of each factor on held-out pairs of trained users.

    Args:
        model: A trained model.
        pairs: Held-out pairs; those of unknown users are ignored.
        factors: The factors to try.
        most: Maximum number of pairs, spread over all.

    Raises:
        ConfigurationError: No pair belongs to a known user, or these users have no trained rows.
    """
    read = {id(table) for table in model.user_model.history_tables()}
    trained = {name: id(table) not in read for name, table in row_tables(model).items()}
    if not any(trained.values()):
        raise ConfigurationError(
            f"shrink: {type(model.user_model).__name__} reads users from their pairs; it has no trained rows to shrink."
        )
    known = model.vocabulary.rows(pairs.user_ids) if model.vocabulary else torch.zeros(len(pairs), dtype=torch.long)
    places = known.nonzero().flatten()
    if not len(places):
        raise ConfigurationError("shrink: no pair belongs to a user in the checkpoint; give pairs of its users.")
    places = places[torch.from_numpy(spread(len(places), most))]
    users, of = torch.unique(known[places], return_inverse=True)
    rows, generic = trained_rows(model, users)
    widths = [table[0].numel() for table in row_tables(model).values()]
    moves = torch.tensor(list(trained.values())).repeat_interleave(torch.tensor(widths)).to(rows.device)
    if not (rows != generic)[:, moves].any():
        raise ConfigurationError(
            "shrink: all users of these pairs have the row of a new user (they were added, but not trained)."
        )
    margins_of = Margins(model, select_pairs(pairs, places))
    drawn = (torch.where(moves, torch.lerp(generic, rows, factor), rows) for factor in factors)
    margins = torch.stack([margins_of(some, of) for some in drawn])
    return Shrinkage(
        tuple(factors),
        F.logsigmoid(margins).mean(1),
        (margins > 0).float().mean(1),
        len(places),
        tuple(name for name, moved in trained.items() if moved),
    )
