"""The plots of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from prlhf_lightning.adaptation import ColdStartPoint
from prlhf_lightning.metrics import UserAccuracy, wilson_interval
from prlhf_lightning.pages import FIRST, INK, LINE, MUTED, SECOND, THIRD, Section
from prlhf_lightning.tasks.report_map import UserMap
from prlhf_lightning.tasks.report_run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW_USERS = 60  # so many intervals can be told apart
_BINS = 8
_COLOURS, _MARKERS = (FIRST, SECOND, THIRD), ("o", "s", "^", "D", "v", "P")
_LOSSES = {"train/loss": "training", "val/seen/loss": "seen users", "val/unseen/loss": "unseen users"}
_RANKS = {
    "val/seen/{}": "seen users",
    "val/seen/{}_worst_decile": "worst tenth of them",
    "val/seen/generic_{}": "same pairs, generic user",
    "val/unseen/{}": "unseen users",
}


def learning_curves(section: Section, run: Run) -> None:
    """Add losses and accuracies over training."""
    losses = {label: run.logged(name) for name, label in _LOSSES.items() if run.logged(name)[0]}
    headline = "auc" if run.logged("val/seen/auc")[0] else "accuracy"
    ranks = {label: run.logged(name.format(headline)) for name, label in _RANKS.items()}
    ranks = {label: found for label, found in ranks.items() if found[0]}
    if not losses and not ranks:
        where = f"{run.folder} has no metrics.csv" if run.folder else "there is no run folder beside the checkpoint"
        section.text(f"Not known: {where}. Name the folder with --run.", "note")
        return
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


def _draw_curves(
    axes: Axes, curves: Mapping[str, tuple[list[float], list[float]]], chance: float | None, what: str
) -> None:
    colours = {"training": MUTED, "same pairs, generic user": MUTED, "worst tenth of them": THIRD}
    for label, (steps, values) in curves.items():
        colour = colours.get(label, SECOND if label == "unseen users" else FIRST)
        if label == "training":
            axes.plot(steps, values, color=LINE, linewidth=0.8)
            steps, values = _smooth(steps, values)
        marker = "o" if label != "training" and len(steps) <= 40 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4.5, label=label)
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


def accuracy_by_votes(section: Section, rows: Sequence[tuple[str, UserAccuracy]], votes: Mapping[str, int]) -> None:
    """Add each user's accuracy against the number of votes that the user gave in training."""
    given = np.array([votes.get(user_id, 0) for user_id, _ in rows])
    accuracy = np.array([row.accuracy for _, row in rows])
    pairs = np.array([row.pairs for _, row in rows])
    if len(np.unique(given)) == 1:
        x, label = np.argsort(np.argsort(accuracy, kind="stable")) + 1, f"users in order; each gave {given[0]:,} votes"
    else:
        x, label = given, "votes given in training"

    def draw(axes: Axes) -> None:
        if len(rows) <= _FEW_USERS:
            low, high = (np.array([getattr(row, end) for _, row in rows]) for end in ("low", "high"))
            axes.vlines(x, low, high, color=LINE, linewidth=2)
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
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel=label, ylabel="pair accuracy", ylim=(min(0.45, accuracy.min() - 0.05), 1.02))

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


def user_map(section: Section, found: UserMap, groups: Sequence[str]) -> None:
    """Add the users' places.

    Args:
        section: Where it goes.
        found: The places.
        groups: What each user is coloured by; empty where users are not told apart.
    """
    names = sorted(set(groups), key=lambda name: (len(name), name))
    points = found.points.numpy()

    def draw(axes: Axes) -> None:
        size = 6 if len(points) <= 200 else 3.5
        for number, name in enumerate(names or [""]):
            own = points[np.array([group == name for group in groups])] if names else points
            colour, marker = _COLOURS[number % 3], _MARKERS[(number // 3) % len(_MARKERS)]
            axes.plot(
                *own.T, marker, color=colour, markersize=size, alpha=0.75, markeredgewidth=0, label=name or "users"
            )
        axes.plot(*found.generic.numpy(), "*", color=INK, markersize=13, label="generic user")
        axes.set(
            xlabel=f"first component ({found.explained[0]:.0%} of the variance)",
            ylabel=f"second component ({found.explained[1]:.0%})",
        )
        axes.margins(0.08)
        axes.figure.legend(loc="outside upper left", ncols=3)

    section.plot(
        draw,
        alt=f"{len(points):,} users on a plane" + (f", in {len(names)} groups." if names else "."),
        caption="Users by the principal components of their soft prompts",
        height=3.8,
    )


def win_bars(section: Section, names: Sequence[str], shares: Sequence[tuple[float, float, float]]) -> None:
    """Add how often what is written for a user won, tied and lost."""

    def draw(axes: Axes) -> None:
        left = np.zeros(len(names))
        height = np.arange(len(names))[::-1]
        for part, colour, label in zip(
            zip(*shares, strict=True), (FIRST, LINE, SECOND), ("won", "tie", "lost"), strict=True
        ):
            axes.barh(height, part, left=left, color=colour, label=label, height=0.6)
            left = left + np.array(part)
        axes.set_yticks(height, names)
        axes.set(xlim=(0, 1), xlabel="share of the comparisons")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", left=False)
        axes.figure.legend(loc="outside upper left", ncols=3)

    section.plot(
        draw,
        alt="; ".join(
            f"against {name}: won {won:.0%}, tie {tie:.0%}, lost {lost:.0%}"
            for name, (won, tie, lost) in zip(names, shares, strict=True)
        ),
        caption="What is written for a user, against",
        height=1.2 + 0.45 * len(names),
    )
