"""How far trained users' rows are to be believed.

A row that was trained on a few dozen noisy judgments fits the noise as well, and predicts its user's other judgments
worse than it could, or even worse than the generic user does. One factor for all users, by which rows are drawn to the
generic user, is fitted to pairs that training did not see (James and Stein 1961; here by likelihood, as margins are not
Gaussian).
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
    """What pairs that training did not see say of each factor.

    Attributes:
        factors: The F factors; 0 makes everyone the generic user, 1 leaves rows as they are.
        log_likelihoods: `[F]` mean over pairs of `log σ(margin)`.
        accuracies: `[F]` share of the pairs that are ranked right.
        pairs: Number of pairs.
        tables: Names, in the user model, of the tables whose rows are drawn; those that are read off pairs stay.
    """

    factors: tuple[float, ...]
    log_likelihoods: Tensor
    accuracies: Tensor
    pairs: int
    tables: tuple[str, ...]

    @property
    def place(self) -> int:
        """Place of the likeliest factor."""
        return int(self.log_likelihoods.argmax())

    @property
    def best(self) -> float:
        """The likeliest factor."""
        return self.factors[self.place]


def fit_shrinkage(
    model: PersonalizedModel, pairs: PreferenceBatch, factors: Sequence[float] = FACTORS, most: int = MOST_PAIRS
) -> Shrinkage:
    """Try factors on pairs of trained users that they were not trained on.

    Args:
        model: A trained model.
        pairs: Such pairs; those of users whom the model does not know are left out.
        factors: The factors to try.
        most: Pairs to look at, spread over all.

    Raises:
        ConfigurationError: There is no pair of a user whom the model knows, or these have no trained rows.
    """
    read = {id(table) for table in model.user_model.history_tables()}
    trained = {name: id(table) not in read for name, table in row_tables(model).items()}
    if not any(trained.values()):
        raise ConfigurationError(
            f"shrink: {type(model.user_model).__name__} reads users off their pairs; it has no trained rows to shrink."
        )
    known = model.vocabulary.rows(pairs.user_ids) if model.vocabulary else torch.zeros(len(pairs), dtype=torch.long)
    places = known.nonzero().flatten()
    if not len(places):
        raise ConfigurationError("shrink: none of these pairs is of a user in the checkpoint; give pairs of its users.")
    places = places[torch.from_numpy(spread(len(places), most))]
    users, of = torch.unique(known[places], return_inverse=True)
    rows, generic = trained_rows(model, users)
    widths = [table[0].numel() for table in row_tables(model).values()]
    moves = torch.tensor(list(trained.values())).repeat_interleave(torch.tensor(widths)).to(rows.device)
    if not (rows != generic)[:, moves].any():
        raise ConfigurationError(
            "shrink: all users of these pairs have the row of a new user, as those have who were added and not trained."
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
