"""Shrinkage of user rows toward the generic user.

A row that was trained on a few dozen noisy judgments also fits the noise. It then predicts its user's other judgments
worse than it could, or even worse than the generic user. One shrinkage factor for all users is fitted to pairs that
training did not see (James and Stein 1961; here by likelihood, since margins are not Gaussian).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.adaptation.adapt import trained_rows
from prlhf_lightning.adaptation.margins import Margins, row_tables
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.types import PreferenceBatch, select_pairs

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
    names = trained_tables(model)
    if not names:
        raise ConfigurationError(
            f"shrink: {type(model.user_model).__name__} reads users from their pairs; it has no trained rows to shrink."
        )
    places = known_rows(model, pairs).nonzero().flatten()
    if not len(places):
        raise ConfigurationError("shrink: no pair belongs to a user in the checkpoint; give pairs of its users.")
    chosen = select_pairs(pairs, places[torch.from_numpy(spread(len(places), most))])
    rows, generic = trained_rows(model, torch.unique(known_rows(model, chosen)))
    if not (rows != generic)[:, _columns(model, names)].any():
        raise ConfigurationError(
            "shrink: all users of these pairs have the row of a new user (they were added, but not trained)."
        )
    margins = margins_by_factor(model, chosen, factors)
    return Shrinkage(tuple(factors), F.logsigmoid(margins).mean(1), (margins > 0).float().mean(1), len(chosen), names)


def margins_by_factor(model: PersonalizedModel, pairs: PreferenceBatch, factors: Sequence[float]) -> Tensor:
    """Return the margins of N pairs with rows at each of F factors, `[F, N]`, on the model's device.

    Args:
        model: A trained model with `trained_tables`.
        pairs: Pairs of known users.
        factors: The parts that are left of the rows' distance from the generic user.
    """
    users, of = torch.unique(known_rows(model, pairs), return_inverse=True)
    rows, generic = trained_rows(model, users)
    margins_of, moves = Margins(model, pairs), _columns(model, trained_tables(model)).to(rows.device)
    moved = (torch.where(moves, torch.lerp(generic, rows, factor), rows) for factor in factors)
    return torch.stack([margins_of(some, of) for some in moved])


def trained_tables(model: PersonalizedModel) -> tuple[str, ...]:
    """Return the names of the user tables that are trained, in the user model; others are read from users' pairs."""
    read = {id(table) for table in model.user_model.history_tables()}
    return tuple(name for name, table in row_tables(model).items() if id(table) not in read)


def known_rows(model: PersonalizedModel, pairs: PreferenceBatch) -> Tensor:
    """Return the number of each pair's user in the tables, `[N]`; 0 for unknown users."""
    return model.vocabulary.rows(pairs.user_ids) if model.vocabulary else torch.zeros(len(pairs), dtype=torch.long)


def _columns(model: PersonalizedModel, names: Collection[str]) -> Tensor:
    """Return which numbers of a user's concatenated rows are of the tables `names`, `[p]` bool."""
    tables = row_tables(model)
    widths = torch.tensor([table[0].numel() for table in tables.values()])
    return torch.tensor([name in names for name in tables]).repeat_interleave(widths)
