"""Models of ids for `baselines.py`: they read no text, and fit in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from baselines_table import interval_over_people

from prlhf_lightning.analysis.feedback_table import read_table
from prlhf_lightning.analysis.personalization_gain import scheme_for, shared_preferences
from prlhf_lightning.analysis.preference_models import ItemPreferences
from prlhf_lightning.analysis.response_factors import well_fitted
from prlhf_lightning.analysis.votes import Votes
from prlhf_lightning.data import FileSource
from prlhf_lightning.reports.differences import votes_of

Floats = npt.NDArray[np.float64]
COUNTS = (0, 2, 5, 10, 20, 30)


def read_votes(train: Path, validation: Path) -> tuple[Votes, Votes]:
    """Return the votes of both files, with the same indices of users and responses."""
    table = read_table(FileSource(train, validation), ["train", "validation"])
    return votes_of(table, "train"), votes_of(table, "validation")


def one_score(train: Votes, validation: Votes, seed: int) -> Floats:
    """Return the margins `[N]` of validation votes under one Bradley-Terry score a response."""
    scores = shared_preferences(train, ItemPreferences(seed), scheme_for(train, validation), seed)
    margins: Floats = scores.margins(validation).numpy()
    return margins


def id_low_rank(train: Votes, validation: Votes, seed: int) -> tuple[Floats, Floats, str]:
    """Return margins `[N]` with and without users' tastes, and what cross-validation chose, in words."""
    found = well_fitted(train, scheme_for(train, validation), seed)
    known = np.isin(validation.users, train.users)
    generic = found.model.truncated(0).margins(validation).numpy()
    own = np.where(known, found.model.margins(validation).numpy(), generic)
    rank = found.model.tastes.shape[1]
    return own, generic, f"rank {rank}, penalty {found.ridge:g}" if rank else "no taste"


def new_people(train: Path, adapt: Path, test: Path, seed: int) -> list[dict[str, float | int | list[float]]]:
    """Return the gain of new people after their first pairs, under the low-rank model of ids.

    Args:
        train: Pairs that the model is fitted to.
        adapt: Pairs of other people, in order of use.
        test: Other pairs of these people.
        seed: Seed of the model.
    """
    table = read_table(FileSource(train, adapt, test), ["train", "validation", "test"])
    votes, first, held_out = (votes_of(table, split) for split in ("train", "validation", "test"))
    held_out = held_out[~np.isin(held_out.users, votes.users)]
    found = well_fitted(votes, scheme_for(votes, held_out), seed)
    order = np.argsort(first.users, kind="stable")
    starts = np.searchsorted(first.users[order], np.arange(first.num_users))
    place = np.empty(len(first), dtype=np.int64)
    place[order] = np.arange(len(first)) - starts[first.users[order]]
    generic = _right(found.model.truncated(0).margins(held_out).numpy())
    points: list[dict[str, float | int | list[float]]] = []
    for count in COUNTS:
        model = found.of_new_users(first[place < count], np.unique(votes.users))
        own = _right(model.margins(held_out).numpy()) if count else generic
        gain = interval_over_people(own - generic, held_out.users)
        points.append({"pairs": count, "people": len(np.unique(held_out.users)), "pooled": own.mean(), "gain": gain})
    return points


def _right(margins: Floats) -> Floats:
    right: Floats = (np.sign(margins) + 1) / 2
    return right
