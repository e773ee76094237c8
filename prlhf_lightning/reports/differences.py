"""Differences between users by features of the answers, from their votes, and their section of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prlhf_lightning.analysis.differences import PreferenceSpread, preference_spread
from prlhf_lightning.analysis.feedback_table import SURFACE_FEATURES, FeedbackTable
from prlhf_lightning.analysis.votes import Floats, Indices, Votes
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.splits import spread as spread_over
from prlhf_lightning.reports.html import FIRST, LINE, MUTED, SECOND, Cell, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VOTES_A_USER, _MOST_VOTES = 200, 40_000  # more would take minutes, and change little
_SELDOM = 0.05
_LEAST_VOTES = 20
_DOTS = 150  # users who are drawn one by one


@dataclass(frozen=True)
class Differences:
    """Spread of users' preferences by feature.

    Attributes:
        features: F things of which an answer can have more, in words; those in which users differ most come first.
        tastes: The same features, over U users; an answer that has typically more of one differs by 1.
        user_ids: The U users.
        votes: Number of votes used.
        seldom: Things that were left out, as the two answers of a pair seldom differ in them.
    """

    features: tuple[str, ...]
    tastes: PreferenceSpread
    user_ids: tuple[str, ...]
    votes: int
    seldom: tuple[str, ...]

    @property
    def is_told(self) -> bool:
        """Whether users differ significantly in any feature."""
        return bool(self.tastes.low[0] > 0)

    def groups(self) -> list[str]:
        """Return for each user whether they like the feature of largest spread more or less than others."""
        away, unsure = self.tastes.weights[:, 0] - self.tastes.mean[0], self.tastes.stds[:, 0]
        names = ("less than most", "about as most", "more than most")
        return [names[1 + int(one > limit) - int(one < -limit)] for one, limit in zip(away, unsure, strict=True)]


def votes_of(table: FeedbackTable, split: Split) -> Votes:
    """Return the votes of a split."""
    part = table.of(split)
    return Votes(table.users[part], table.chosen[part], table.rejected[part], table.num_users, len(table.prompts))


def find_differences(table: FeedbackTable, votes: Votes, seed: int = 0) -> Differences | str:
    """Find how far users' tastes lie apart.

    Args:
        table: Answers and their features.
        votes: Votes on them.
        seed: Draws users, where there are too many votes, and what intervals rest on.

    Returns:
        What was found, or why nothing can be.
    """
    votes = _some(votes, seed)
    users = np.unique(votes.users)
    if len(users) < 2:
        return "There is one user only, who differs from nobody."
    if len(votes) < _LEAST_VOTES:
        return f"There are too few votes to tell: {len(votes)}."
    differences = table.features[votes.winners] - table.features[votes.losers]
    often = (differences != 0).mean(0) >= _SELDOM
    if not often.any():
        return "The answers of a pair differ in nothing that can be counted."
    differences = differences[:, often]
    usual = np.sqrt((differences**2).sum(0) / (differences != 0).sum(0))
    place = np.unique(votes.users, return_inverse=True)[1]
    found = preference_spread(place, differences / usual, len(users), seed)
    order = np.argsort(-found.spread, kind="stable")
    names = np.array(list(SURFACE_FEATURES.values()))
    return Differences(
        tuple(names[often][order].tolist()),
        PreferenceSpread(
            **{name: getattr(found, name)[..., order] for name in ("mean", "spread", "low", "high", "weights", "stds")}
        ),
        tuple(table.user_ids[user] for user in users),
        len(votes),
        tuple(names[~often].tolist()),
    )


def _some(votes: Votes, seed: int) -> Votes:
    """Return some votes of each user, and of so many users, drawn at random, that they can be looked at in seconds."""
    draw = np.random.default_rng(seed)
    votes = votes[draw.permutation(len(votes))]
    order = np.argsort(votes.users, kind="stable")
    starts = np.searchsorted(votes.users[order], votes.users[order])
    votes = votes[np.sort(order[np.arange(len(votes)) - starts < _VOTES_A_USER])]
    users = draw.permutation(np.unique(votes.users))
    up_to = np.cumsum(np.bincount(votes.users)[users])
    return votes[np.isin(votes.users, users[: max(2, int(np.searchsorted(up_to, _MOST_VOTES, side="right")))])]


def differences_content(
    found: Differences, followed: Mapping[str, tuple[float, float, float]] | None = None
) -> dict[str, Any]:
    """Return what users differ in as JSON values, without users' ids.

    Args:
        found: The differences.
        followed: For features, how closely what a model writes for users follows their tastes: a correlation and the
            ends of its interval.
    """
    tastes, dots = found.tastes, spread_over(len(found.user_ids), _DOTS)
    return {
        "votes": found.votes,
        "users": len(found.user_ids),
        "left_out": list(found.seldom),
        "features": [
            {
                "feature": name,
                **{key: float(getattr(tastes, key)[place]) for key in ("mean", "spread", "low", "high")},
                "some_users": tastes.weights[dots, place].tolist(),
                "followed": dict(zip(("correlation", "low", "high"), followed[name], strict=True))
                if followed and name in followed
                else None,
            }
            for place, name in enumerate(found.features)
        ],
    }


def in_words(features: Sequence[Mapping[str, Any]]) -> str:
    """Return in a sentence or two what users differ in; the arguments are `features` of `differences_content`."""
    most = features[0]
    if not most["low"] > 0:
        return "These votes do not show that users differ in anything that can be counted in an answer."
    low, high = (_share(most["mean"] + side * most["spread"]) for side in (-1, 1))
    said = (
        f"Users differ most in whether they like answers with {most['feature']}: two in three of them choose such an "
        f"answer between {low:.0%} and {high:.0%} of the time, all else being alike."
    )
    others = [feature["feature"] for feature in features[1:] if feature["low"] > 0]
    return f"{said} They also differ in: {', '.join(others)}." if others else said


def add_differences(section: Section, content: Mapping[str, Any]) -> None:
    """Add a plot and a table of what users differ in.

    Args:
        section: Where they go.
        content: See `differences_content`.
    """
    features = content["features"]
    followed = any(feature["followed"] for feature in features)
    section.text(in_words(features))
    section.plot(
        lambda axes: _draw(axes, features),
        alt="; ".join(f"{feature['feature']}: {_of_most(feature)}" for feature in features),
        caption="How often users choose the answer with more of it, all else being alike. Dots: users; bar: two in "
        "three users; whiskers: the same at the upper end of the bar's 95% interval",
        height=0.9 + 0.42 * len(features),
    )
    rows: list[list[Cell]] = []
    for feature in features:
        row: list[Cell] = [
            feature["feature"],
            f"{_share(feature['mean']):.0%}",
            _of_most(feature),
            "{spread:.2f} ({low:.2f} to {high:.2f})".format(**feature),
        ]
        if followed:
            known = feature["followed"]
            row.append("{correlation:+.2f} ({low:+.2f} to {high:+.2f})".format(**known) if known else "-")
        rows.append(row)
    columns = ["an answer with", "chosen by the average user", "by two in three users", "spread"]
    section.table(
        columns + (["what is written follows"] if followed else []),
        rows,
        "The same in numbers. Spread: standard deviation of users' weights in log-odds, with its 95% interval; "
        "from 0 on, users may be alike"
        + (
            ". Last: correlation, over users, of how much they like it and how much of it the model writes for them"
            if followed
            else ""
        ),
    )
    section.text(
        f"By {content['votes']:,} votes of {content['users']:,} users: a logistic regression on what can be counted in "
        "an answer, in which each user has weights of their own. It tells the features apart: who likes lists, which "
        "are long, need not like length. “More” is the usual difference between two answers that differ in it. What "
        "cannot be counted, such as topic, tone or truth, is not seen."
        + (
            f" Left out, as the two answers seldom differ in it: {', '.join(content['left_out'])}."
            if content["left_out"]
            else ""
        ),
        "note",
    )


def _of_most(feature: Mapping[str, Any]) -> str:
    low, high = (_share(feature["mean"] + side * feature["spread"]) for side in (-1, 1))
    return f"{low:.0%} to {high:.0%}"


def correlations(found: Differences, features: Mapping[str, Floats]) -> dict[str, tuple[float, float, float]]:
    """Return how closely texts follow the tastes of those for whom they were written: correlations over users.

    Args:
        found: The tastes.
        features: For at least five users `[F]` each, the mean of all `SURFACE_FEATURES` of what was written.

    Returns:
        By feature: Pearson's correlation, and its 95% interval by Fisher's z.
    """
    place = {user_id: number for number, user_id in enumerate(found.user_ids)}
    users = [user_id for user_id in features if user_id in place]
    if len(users) < 5:
        return {}
    rows: Indices = np.array([place[user_id] for user_id in users])
    written = dict(zip(SURFACE_FEATURES.values(), np.stack([features[user_id] for user_id in users]).T, strict=True))
    result = {}
    for number, name in enumerate(found.features):
        liked, had = found.tastes.weights[rows, number], written[name]
        if min(liked.std(), had.std()) > 1e-9 and found.tastes.low[number] > 0:
            r = float(np.corrcoef(liked, had)[0, 1])
            z, half = np.arctanh(np.clip(r, -0.999, 0.999)), 1.96 / np.sqrt(len(users) - 3)
            result[name] = (r, float(np.tanh(z - half)), float(np.tanh(z + half)))
    return result


def _draw(axes: Axes, features: Sequence[Mapping[str, Any]]) -> None:
    draw = np.random.default_rng(0)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle="--")
    for place, feature in enumerate(features):
        y, mean, spread, high = -place, feature["mean"], feature["spread"], feature["high"]
        color = FIRST if feature["low"] > 0 else MUTED
        users = _share(np.array(feature["some_users"]))
        jitter = y - 0.27 + draw.uniform(-0.1, 0.1, len(users))
        axes.plot(users, jitter, "o", color=SECOND, markersize=2.5, alpha=0.5, markeredgewidth=0)
        axes.plot(_share(mean + np.array([-high, high])), [y, y], color=LINE, linewidth=2)
        axes.plot(_share(mean + np.array([-spread, spread])), [y, y], color=color, linewidth=5, solid_capstyle="butt")
        axes.plot(_share(mean), y, "o", color=color, markersize=8)
    axes.set(xlim=(0, 1), ylim=(0.5 - len(features), 0.6), xlabel="chosen")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_yticks(-np.arange(len(features)), [feature["feature"] for feature in features])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", left=False)


def _share(log_odds: Any) -> Any:
    return 0.5 * (1 + np.tanh(log_odds / 2))
