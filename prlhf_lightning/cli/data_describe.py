"""The command `data describe`: a page about feedback, with an estimate of the gain from personalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prlhf_lightning.analysis.feedback_table import FeedbackTable, read_table
from prlhf_lightning.analysis.personalization_gain import (
    Scheme,
    folds,
    known_from_others,
    number_of_fits,
    personalization_gain,
    scheme_for,
)
from prlhf_lightning.analysis.preference_models import FeaturePreferences, ItemPreferences, PreferenceFamily
from prlhf_lightning.analysis.votes import Votes
from prlhf_lightning.cli.data_check import the_source
from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.sources.files import Paths
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.reports.description import Description, Finding, description_content
from prlhf_lightning.reports.description_page import page_of
from prlhf_lightning.reports.differences import find_differences, votes_of
from prlhf_lightning.reports.json_file import json_path, to_json
from prlhf_lightning.utils.io import check_output, write_together
from prlhf_lightning.utils.progress import progress_bars

_FEW_PROMPTS = 20
_HELD_OUT: dict[Scheme, str] = {
    "items": "the votes between responses that were set aside, each eighth of a user's responses in turn",
    "pairs": "the votes on a quarter of the pairs of responses, an eighth at a time",
    "votes": "the votes on a quarter of each user's pairs, an eighth at a time",
}


def describe(
    train: Paths | None = None,
    validation: Paths | None = None,
    columns: dict[str, str] | None = None,
    source: DataSource | None = None,
    output: Path = Path("description.html"),
    title: str | None = None,
    max_votes: int = 200_000,
    seed: int = 0,
) -> None:
    """Write a page that describes feedback and estimates the gain from personalization.

    The page shows votes per user, lengths, agreement between users, length bias, contradictions, and the held-out
    accuracy of small models with and without users' own preferences. It shows no text and no user id.

    Args:
        train: Training file or files: JSON Lines, JSON, CSV (each also gzipped) or Parquet.
        validation: Validation file or files; without them, part of the training votes is held out.
        columns: Mapping of fields to column names, such as `{user_id: worker}`.
        source: A source in place of files, as for `fit --data.source`. Its test split is ignored.
        output: The page to write, a self-contained HTML file. Its content is written next to it, as
            `description.json`.
        title: Its title.
        max_votes: With more training votes, the models of the gain are fitted to the votes of randomly chosen users, up
            to this number. All other statistics use all votes.
        seed: Seed of the held-out votes, users, and bootstrap samples.
    """
    if max_votes < 1:
        raise ConfigurationError(f"max_votes is {max_votes}; give a number above 0.")
    if seed < 0:
        raise ConfigurationError(f"seed is {seed}; give a number of at least 0.")
    check_output(output, "output")
    check_output(json_path(output), "output")
    feedback = the_source(train, validation, None, columns, source)
    if "train" not in feedback.splits():
        raise ConfigurationError(f"{type(feedback).__name__} has no train split to describe; give it one.")
    splits: list[Split] = ["train", *(["validation"] if "validation" in feedback.splits() else [])]  # type: ignore[list-item]
    table = read_table(feedback, splits)
    if not table.rows["train"]:
        raise ConfigurationError("train: there are no votes in it, but for ties; name other files.")
    finding = find_personalization_gain(table, max_votes, seed)
    votes = votes_of(table, "train")
    name = title or (Path(str(train)).name if isinstance(train, str | Path) else type(feedback).__name__)
    content = description_content(Description(name, table, votes, finding, find_differences(table, votes, seed)))
    write_together({output: page_of(content).render().encode(), json_path(output): to_json(content)})
    print(content["in_short"])
    print(f"The page: {output}")
    print(f"The same as JSON: {json_path(output)}")


def find_personalization_gain(table: FeedbackTable, max_votes: int = 200_000, seed: int = 0) -> Finding:
    """Return the comparison of models with and without users' own preferences on held-out votes."""
    votes, remarks = votes_of(table, "train"), []
    validation = votes_of(table, "validation") if table.rows.get("validation") else None
    if len(votes) > max_votes:
        votes, validation, remark = _of_fewer_users(votes, validation, max_votes, seed)
        remarks.append(remark)
    shared_items = known_from_others(votes, votes if validation is None else validation) >= 0.5
    scheme = scheme_for(votes, validation)
    family: PreferenceFamily = (
        ItemPreferences(seed) if shared_items else FeaturePreferences(_scaled_features(table, votes))
    )
    if validation is not None:
        held_out, parts = "the votes of the validation split", [(votes, validation)]
        there = np.isin(validation.users, votes.users)
        if not there.all():
            remarks.append(f"{(~there).sum():,} held-out votes are of users whom these models do not know; left out.")
    elif not shared_items and len(np.unique(table.prompts)) >= _FEW_PROMPTS:
        held_out = "the votes on a quarter of the prompts, drawn at random"
        part = np.random.default_rng(seed).integers(4, size=len(table.prompt_words))[table.prompts[votes.winners]]
        parts = [(votes[part > 0], votes[part == 0])]
    else:
        held_out = _HELD_OUT[scheme]
        # Between an eighth of a user's items there are few pairs, one in 64: these of all eighths are needed.
        parts = [(votes[train], votes[test]) for train, test in folds(votes, scheme, seed + 1, count=8)]
        parts = parts if scheme == "items" else parts[:2]
    with progress_bars() as progress:
        task = progress.add_task("Fitting small models of tastes", total=len(parts) * number_of_fits(family))
        result = personalization_gain(parts, family, scheme, seed, lambda: progress.advance(task))
    return Finding(result, "items" if shared_items else "features", held_out, remarks)


def _of_fewer_users(
    votes: Votes, validation: Votes | None, max_votes: int, seed: int
) -> tuple[Votes, Votes | None, str]:
    """Return the votes of as many users, drawn at random, as have up to some number of them; and what was done."""
    users = np.random.default_rng(seed).permutation(np.unique(votes.users))
    up_to = np.cumsum(np.bincount(votes.users)[users])
    drawn = users[: max(1, np.searchsorted(up_to, max_votes, side="right"))]
    votes = votes[np.isin(votes.users, drawn)]
    if validation is not None:
        validation = validation[np.isin(validation.users, drawn)]
        validation = validation if len(validation) else None
    return votes, validation, f"The comparison is of {len(votes):,} votes of {len(drawn):,} users, drawn at random."


def _scaled_features(table: FeedbackTable, votes: Votes) -> torch.Tensor:
    """Return `[I, F]` features whose differences within the pairs of some votes are of size one."""
    differences = table.features[votes.winners] - table.features[votes.losers]
    scale = np.sqrt(np.mean(differences**2, axis=0))
    return torch.from_numpy(table.features / np.where(scale > 0, scale, np.inf))
