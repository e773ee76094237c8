"""The plots of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from prlhf_lightning.adaptation import ColdStartPoint
from prlhf_lightning.analysis.votes import Floats
from prlhf_lightning.analysis.win_rate import UserMean
from prlhf_lightning.metrics import wilson_interval
from prlhf_lightning.reports.html import FIRST, FOURTH, INK, LINE, MUTED, SECOND, THIRD, Section
from prlhf_lightning.reports.json_file import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW_USERS = 60  # so many intervals can be told apart
_BINS = 8
# Each group has a shape of its own too, for those who do not tell the colors apart.
_COLORS, _MARKERS = (FIRST, SECOND, THIRD, FOURTH, MUTED), ("o", "s", "^", "D", "v", "P", "X", "p")
_LABELED = 25
_LABEL_LENGTH = 18
_LOSSES = {"train/loss": "training", "val/seen/loss": "seen users", "val/unseen/loss": "unseen users"}
_RANKS = {
    "val/seen/{}": "seen users",
    "val/seen/{}_worst_decile": "worst tenth of them",
    "val/seen/generic_{}": "same pairs, generic user",
    "val/unseen/{}": "unseen users",
}


def learning_curves(section: Section, logged: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    """Add losses and accuracies over training.

    Args:
        section: Where they go.
        logged: By the name that a value was logged under, its `steps` and `values`.
    """
    headline = "auc" if "val/seen/auc" in logged else "accuracy"
    losses = {label: _curve(logged[name]) for name, label in _LOSSES.items() if name in logged}
    ranks = {label: _curve(logged[at]) for name, label in _RANKS.items() if (at := name.format(headline)) in logged}
    for what, curves, chance in (("Loss", losses, None), ("AUC" if headline == "auc" else "Accuracy", ranks, 0.5)):
        if not curves:
            continue
        last = ", ".join(f"{label} {values[-1]:.3f}" for label, (_, values) in curves.items())
        section.plot(
            partial(_draw_curves, curves=curves, chance=chance, what=what),
            alt=f"{what} over training steps. At the end: {last}.",
            caption=f"{what} over training"
            + (" (training: of single batches, and their running mean)" if "training" in curves else ""),
            height=3.0,
        )


def _curve(found: Mapping[str, Sequence[float | None]]) -> tuple[list[float], list[float]]:
    return [number(step) for step in found["steps"]], [number(value) for value in found["values"]]


def _draw_curves(
    axes: Axes, curves: Mapping[str, tuple[list[float], list[float]]], chance: float | None, what: str
) -> None:
    colors = {"training": MUTED, "same pairs, generic user": MUTED, "worst tenth of them": THIRD}
    for label, (steps, values) in curves.items():
        color = colors.get(label, SECOND if label == "unseen users" else FIRST)
        if label == "training":
            axes.plot(steps, values, color=LINE, linewidth=0.8)
            steps, values = _smooth(steps, values)
        marker = "o" if label != "training" and len(steps) <= 40 else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4.5, label=label)
    if chance is not None:
        axes.axhline(chance, color=LINE, linewidth=1, linestyle="--")
    axes.set(xlabel="training steps", ylabel=what.lower() if what != "AUC" else what)
    axes.set_xlim(left=0)
    axes.ticklabel_format(useOffset=False)
    axes.figure.legend(loc="outside upper left", ncols=2)


def _smooth(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    width = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return list(steps)[width - 1 :], means.tolist()


def accuracy_by_votes(section: Section, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add each user's accuracy against the number of votes that the user gave in training.

    Args:
        section: Where it goes.
        rows: Of each user `votes`, `pairs`, `accuracy`, `low` and `high`.
    """
    given, pairs = (np.array([row[name] for row in rows]) for name in ("votes", "pairs"))
    accuracy, lows, highs = (np.array([number(row[name]) for row in rows]) for name in ("accuracy", "low", "high"))
    if len(np.unique(given)) == 1:
        x, label = np.argsort(np.argsort(accuracy, kind="stable")) + 1, f"users in order; each gave {given[0]:,} votes"
    else:
        x, label = given, "votes given in training"

    def draw(axes: Axes) -> None:
        if len(rows) <= _FEW_USERS:
            axes.vlines(x, lows, highs, color=LINE, linewidth=2)
            axes.plot(x, accuracy, "o", color=FIRST, markersize=5)
        else:
            axes.plot(x, accuracy, "o", color=FIRST, markersize=3, alpha=0.35, markeredgewidth=0)
            for part in np.array_split(np.argsort(x, kind="stable"), _BINS):
                hits, total = float((accuracy * pairs)[part].sum()), int(pairs[part].sum())
                middle = float(np.median(x[part]))
                axes.vlines(middle, *wilson_interval(hits / total, total), color=SECOND, linewidth=2.5)
                axes.plot(middle, hits / total, "s", color=SECOND, markersize=6)
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
        if x is not given:
            axes.set_xlim(0, len(rows) + 1)
            axes.locator_params(axis="x", integer=True)
        if x is given and given.min() > 0 and given.max() > 10 * given.min():
            axes.set_xscale("log")
        lowest = (lows if len(rows) <= _FEW_USERS else accuracy).min()
        axes.set(xlabel=label, ylabel="pair accuracy", ylim=(min(0.45, lowest - 0.02), 1.02))

    squares = "" if len(rows) <= _FEW_USERS else "; squares: eighths of the users"
    section.plot(
        draw,
        alt=f"Accuracy of {len(rows):,} users, from {accuracy.min():.2f} to {accuracy.max():.2f}, the median "
        f"{np.median(accuracy):.2f}, against votes given, from {given.min():,} to {given.max():,}.",
        caption=f"Each seen user's accuracy, with 95% Wilson intervals{squares}",
        height=3.0,
    )


def cold_start_curve(section: Section, points: Sequence[ColdStartPoint]) -> None:
    """Add the accuracy on new users by the number of their pairs."""

    def draw(axes: Axes) -> None:
        x = [point.pairs for point in points]
        axes.errorbar(
            x,
            [point.accuracy for point in points],
            yerr=[0.0 if point.interval != point.interval else point.interval for point in points],
            color=FIRST,
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1.8,
            label="with a row of their own",
        )
        axes.plot(x, [point.generic for point in points], color=MUTED, linestyle="--", label="generic user")
        axes.set(xlabel="pairs of a new user", ylabel="pair accuracy", xticks=x)
        axes.figure.legend(loc="outside upper left", ncols=2)

    section.plot(
        draw,
        alt="; ".join(f"{point.pairs} pairs: {point.accuracy:.2f}" for point in points),
        caption="Accuracy on other pairs of users whom training did not meet, with 95% intervals of the gain",
        height=2.9,
    )
    section.table(
        ["pairs a user", "users", "accuracy", "generic user", "gain", "±"],
        [[str(p.pairs), p.users, p.accuracy, p.generic, f"{p.gain:+.3f}", p.interval] for p in points],
        "Means over users; ± is half a 95% interval, by the spread between users",
    )


def reliability(section: Section, bins: Sequence[Mapping[str, Any]], whose: str) -> None:
    """Add how often a reward model is right, against how sure it is.

    Args:
        section: Where it goes.
        bins: Of each bin `pairs`, the mean `confidence`, and the `accuracy` with `low` and `high`.
        whose: Whose pairs they are.
    """
    sure, right, lows, highs = ([row[name] for row in bins] for name in ("confidence", "accuracy", "low", "high"))

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
        axes.vlines(sure, lows, highs, color=LINE, linewidth=2)
        axes.plot(sure, right, "o", color=FIRST, markersize=5.5, label=whose)
        lowest = min([0.45, *(low - 0.02 for low in lows)])
        axes.set(xlabel="probability of the preferred text", ylabel="share chosen by users", ylim=(lowest, 1.02))
        axes.figure.legend(loc="outside upper left", ncols=2)

    section.plot(
        draw,
        alt="; ".join(
            f"expected {row['confidence']:.2f}, chosen {row['accuracy']:.2f} of {row['pairs']:,} pairs" for row in bins
        ),
        caption="How often users choose the text that the rewards prefer, with 95% Wilson intervals",
        height=3.2,
    )


def user_map(section: Section, found: Mapping[str, Any]) -> None:
    """Add a map of users.

    Args:
        section: Where it goes.
        found: `explained`, a share for each axis; the place of the `generic` user; and of `users` the name `user`, the
            `place` and the `group`, by which they are colored, or None. Few users have their names beside them.
    """
    points, generic = np.array([user["place"] for user in found["users"]]), np.array(found["generic"])
    groups, names = ([user[name] for user in found["users"]] for name in ("group", "user"))
    kinds = sorted({group for group in groups if group is not None}, key=lambda name: (len(name), name))

    def draw(axes: Axes) -> None:
        size = 6 if len(points) <= 200 else 3.5
        for place, kind in enumerate(kinds or [""]):
            own = points[np.array([group == kind for group in groups])] if kinds else points
            color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
            axes.plot(
                *own.T, marker, color=color, markersize=size, alpha=0.75, markeredgewidth=0, label=kind or "users"
            )
        axes.plot(*generic, "*", color=INK, markersize=13, label="generic user")
        axes.set(
            xlabel=f"first component ({found['explained'][0]:.0%} of the variance)",
            ylabel=f"second component ({found['explained'][1]:.0%})",
        )
        axes.margins(0.12 if len(points) <= _LABELED else 0.08)
        axes.figure.legend(loc="outside upper left", ncols=2)
        if len(points) <= _LABELED:
            _label(axes, points, names, generic)

    section.plot(
        draw,
        alt=f"{len(points):,} users on a plane" + (f", in {len(kinds)} groups." if kinds else "."),
        caption="Users by the principal components of their soft prompts",
        height=4.2,
    )


def _label(axes: Axes, points: Floats, names: Sequence[str], generic: Floats) -> None:
    """Write names next to points, each on the side with the least overlap."""
    if (figure := axes.get_figure(root=True)) is not None:
        figure.draw_without_rendering()  # lays out the axes: places in the figure are known
    places = axes.transData.transform(points)
    middle = axes.bbox.x0 + axes.bbox.width / 2
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in [*places, axes.transData.transform(generic)]]
    by_height = sorted(zip(points, places, names, strict=True), key=lambda found: -float(found[1][1]))
    for point, (x, y), name in by_height:
        shown = name if len(name) <= _LABEL_LENGTH else f"{name[: _LABEL_LENGTH - 1]}…"
        width, sides = 6.0 * len(shown), (("left", 6, 0), ("right", -6, 0), ("left", 4, 9), ("right", -4, -9))
        boxes = []
        for side, right, up in sides if x < middle else (sides[1], sides[0], sides[3], sides[2]):
            start = x + right - (width if side == "right" else 0)
            box = (start, y + up - 5, start + width, y + up + 5)
            outside = max(0.0, axes.bbox.x0 - box[0]) + max(0.0, box[2] - axes.bbox.x1)
            boxes.append((sum(_overlap(box, other) for other in taken) + 10 * outside, side, right, up, box))
        _, side, right, up, box = min(boxes, key=lambda found: found[0])
        taken.append(box)
        axes.annotate(
            shown,
            (float(point[0]), float(point[1])),
            (right, up),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8.5,
            color=MUTED,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the area that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def win_bars(
    section: Section, names: Sequence[str], shares: Sequence[tuple[float, float, float]], rates: Sequence[UserMean]
) -> None:
    """Add a bar chart of wins, ties and losses of the answers for users, and the win rates with intervals."""

    def draw(axes: Axes) -> None:
        left = np.zeros(len(names))
        height = np.arange(len(names))[::-1]
        for part, color, label in zip(
            zip(*shares, strict=True), (FIRST, LINE, SECOND), ("won", "tie", "lost"), strict=True
        ):
            axes.barh(height + 0.12, part, left=left, color=color, label=label, height=0.45)
            left = left + np.array(part)
        for place, rate in zip(height - 0.3, rates, strict=True):
            if rate.low == rate.low:
                axes.plot([rate.low, rate.high], [place, place], color=INK, linewidth=2, solid_capstyle="butt")
        axes.plot(
            [rate.value for rate in rates], height - 0.3, "D", color=INK, markersize=5.5, label="win rate, 95% interval"
        )
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle="--")
        axes.set_yticks(height, names)
        axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel="share of the comparisons")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", left=False)
        axes.figure.legend(loc="outside upper left", ncols=2)

    section.plot(
        draw,
        alt="; ".join(
            f"against {name}: won {won:.0%}, tie {tie:.0%}, lost {lost:.0%}, win rate {rate.value:.0%}"
            + (f" ({rate.low:.0%} to {rate.high:.0%})" if rate.low == rate.low else "")
            for name, (won, tie, lost), rate in zip(names, shares, rates, strict=True)
        ),
        caption="What is written for a user, against; in the win rate ties count half",
        height=1.5 + 0.55 * len(names),
    )
