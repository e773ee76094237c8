"""Findings of `data describe`, and their JSON form, from which the page is generated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from prlhf_lightning.analysis.feedback_table import FeedbackTable
from prlhf_lightning.analysis.personalization_gain import ENOUGH_USERS, ENOUGH_VOTES, SMALL, PersonalizationGain
from prlhf_lightning.analysis.votes import (
    Votes,
    agreement_between_users,
    contradictions,
    cycles,
    spread_between_users,
)
from prlhf_lightning.reports.differences import Differences, differences_content
from prlhf_lightning.reports.json_file import finite

_Floats: TypeAlias = npt.NDArray[np.float64]
FORMAT = 1
QUANTILES = (0, 10, 25, 50, 75, 90, 100)
VOTES_FOR_A_RATE = 10  # with fewer, a user's rate is mostly chance


@dataclass(frozen=True)
class Finding:
    """Estimate of the gain from personalization.

    Attributes:
        headroom: The comparison, or None where there are too few votes for any.
        kind: Whether the models score `items`, or their `features`.
        held_out: What was held out, in words.
        remarks: What else there is to say of the comparison.
    """

    headroom: PersonalizationGain | None
    kind: Literal["items", "features"]
    held_out: str
    remarks: list[str]


@dataclass(frozen=True)
class Description:
    """What there is to describe.

    Attributes:
        name: Of the data.
        table: All rows.
        votes: Those of the training split.
        finding: How much there is to personalize.
        differences: What users differ in, or why that cannot be told.
    """

    name: str
    table: FeedbackTable
    votes: Votes
    finding: Finding
    differences: Differences | str


def in_words(finding: Finding) -> str:
    """Return a summary of the findings."""
    found = finding.headroom
    if found is None:
        return "Cannot tell whether there is something to personalize: there are too few votes to hold any out."
    gain = found.by_user
    numbers = (
        f"Knowing the user changes a user's held-out pair accuracy by {points(gain.gain)} points on average (95% "
        f"interval {points(gain.low)} to {points(gain.high)}), from {gain.shared:.3f} to {gain.personal:.3f}."
    )
    if found.verdict == "something":
        return f"There is something to personalize. {numbers}"
    if found.by_vote.low > 0:
        numbers += (
            f" Over all votes the change is {points(found.by_vote.gain)} points: {found.half_by:,} of the "
            f"{found.users:,} users make half of all that is gained."
        )
    if found.verdict == "next to nothing":
        return f"There is next to nothing to personalize that these votes could teach. {numbers}"
    reason = (
        f"the interval is too wide to rule out a gain of {100 * SMALL:.0f} point."
        if found.votes >= ENOUGH_VOTES and found.users >= ENOUGH_USERS
        else f"{found.votes:,} held-out votes of {found.users:,} users cannot rule out a small gain "
        f"({ENOUGH_VOTES:,} of {ENOUGH_USERS} would)."
    )
    return f"Cannot tell whether there is something to personalize: {reason} {numbers}"


def description_content(description: Description) -> dict[str, Any]:
    """Return a description as JSON values, without texts and users' ids; numbers that are not finite are None."""
    table, votes, differences = description.table, description.votes, description.differences
    per_user = np.bincount(votes.users, minlength=table.num_users)
    given, users = np.unique(per_user[per_user > 0], return_counts=True)
    is_known = isinstance(differences, Differences)
    content = {
        "format": FORMAT,
        "title": description.name,
        "in_short": in_words(description.finding),
        "rows": table.rows,
        "ties": sum(table.ties.values()),
        "gain": _gain(description.finding),
        "differences": differences_content(differences) if isinstance(differences, Differences) else None,
        "unknown": {} if is_known else {"differences": differences},
        "votes_by_user": {"votes": given.tolist(), "users": users.tolist()},
        "words": _words(table, votes),
        "agreement": _agreement(votes),
        "length_bias": _length_bias(table, votes),
        "contradictions": {"changed_mind": asdict(contradictions(votes)), "cycles": asdict(cycles(votes))},
    }
    return dict(finite(content))


def _gain(finding: Finding) -> dict[str, Any] | None:
    found = finding.headroom
    if found is None:
        return None
    return {
        **asdict(found),
        "verdict": found.verdict,
        "kind": finding.kind,
        "held_out": finding.held_out,
        "remarks": finding.remarks,
    }


def _words(table: FeedbackTable, votes: Votes) -> dict[str, Any]:
    prompts = table.prompt_words[np.unique(table.prompts[votes.winners])]
    chosen, rejected = table.words[votes.winners], table.words[votes.losers]
    top = max(1, np.quantile(np.concatenate([chosen, rejected]), 0.99))
    edges = np.linspace(0, top, min(30, int(top) + 1))
    return {
        "prompts": len(prompts),
        "quantiles": {
            name: np.percentile(values, QUANTILES).tolist()
            for name, values in (("prompts", prompts), ("chosen", chosen), ("rejected", rejected))
        },
        "histogram": {
            "edges": edges.tolist(),
            "chosen": np.histogram(np.minimum(chosen, top), edges)[0].tolist(),
            "rejected": np.histogram(np.minimum(rejected, top), edges)[0].tolist(),
        },
    }


def _agreement(votes: Votes) -> dict[str, Any]:
    voters = np.unique(np.stack([votes.pairs, votes.users]), axis=1)[0]
    sizes, pairs = np.unique(np.unique(voters, return_counts=True)[1], return_counts=True)
    return {
        **asdict(agreement_between_users(votes)),
        "pairs_by_users": {"users": sizes.tolist(), "pairs": pairs.tolist()},
    }


def _length_bias(table: FeedbackTable, votes: Votes) -> dict[str, Any] | None:
    difference = table.characters[votes.winners] - table.characters[votes.losers]
    differs = difference != 0
    if not differs.any():
        return None
    users = votes.users[differs]
    longer = np.bincount(users, weights=difference[differs] > 0, minlength=table.num_users).astype(float)
    total = np.bincount(users, minlength=table.num_users).astype(float)
    overall = float(longer.sum() / total.sum())
    found: dict[str, Any] = {"longer_wins": overall, "spread": spread_between_users(longer, total), "users": None}
    regular = total >= VOTES_FOR_A_RATE
    if regular.any():
        shares = longer[regular] / total[regular]
        alike = _shares_if_all_were_alike(total[regular], overall)
        edges = np.linspace(0, 1, 21)
        found["users"] = {
            "count": len(shares),
            "quantiles": np.percentile(shares, QUANTILES).tolist(),
            "histogram": {
                "edges": edges.tolist(),
                "users": np.histogram(_spread(shares, total[regular]), edges)[0].tolist(),
                "if_alike": (np.histogram(alike, edges)[0] * (len(shares) / len(alike))).tolist(),
            },
        }
    return found


def _shares_if_all_were_alike(totals: _Floats, rate: float) -> _Floats:
    """Return shares of users who all have the same true rate, several draws a user for a smooth outline."""
    repeated = np.tile(totals, max(1, 20_000 // len(totals)))
    return _spread(np.random.default_rng(0).binomial(repeated.astype(np.int64), rate) / repeated, repeated)


def _spread(shares: _Floats, totals: _Floats) -> _Floats:
    """Spread each share evenly over what would be rounded to it, lest bars hold now two and now three values."""
    moved: _Floats = shares + np.random.default_rng(0).uniform(-0.5, 0.5, len(shares)) / totals
    return moved.clip(0, 1)


def points(change: float) -> str:
    """Return a change of accuracy in points."""
    return f"{round(100 * change, 1) + 0.0:+.1f}"  # adding zero makes minus zero one of plus
