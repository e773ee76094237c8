"""The page that `data describe` writes, section by section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from prlhf_lightning.analysis.feedback_table import SURFACE_FEATURES, FeedbackTable
from prlhf_lightning.analysis.personalization_gain import ENOUGH_USERS, ENOUGH_VOTES, SMALL, PersonalizationGain
from prlhf_lightning.analysis.votes import (
    Rate,
    Votes,
    agreement_between_users,
    contradictions,
    cycles,
    spread_between_users,
)
from prlhf_lightning.reports.differences import Differences, add_differences, differences_content
from prlhf_lightning.reports.html import FIRST, LINE, MUTED, SECOND, Cell, Page, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Floats: TypeAlias = npt.NDArray[np.float64]
_QUANTILES = (0, 10, 25, 50, 75, 90, 100)
_VOTES_FOR_A_RATE = 10  # with fewer, a user's rate is mostly chance


@dataclass(frozen=True)
class Finding:
    """What was found of how much there is to personalize.

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
    """What a page is made of.

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
    """Return what was found in a few sentences."""
    found = finding.headroom
    if found is None:
        return "Cannot tell whether there is something to personalize: there are too few votes to hold any out."
    gain = found.by_user
    numbers = (
        f"Knowing the user changes a user's held-out pair accuracy by {_points(gain.gain)} points on average (95% "
        f"interval {_points(gain.low)} to {_points(gain.high)}), from {gain.shared:.3f} to {gain.personal:.3f}."
    )
    if found.verdict == "something":
        return f"There is something to personalize. {numbers}"
    if found.by_vote.low > 0:
        numbers += (
            f" Over all votes the change is {_points(found.by_vote.gain)} points: {found.half_by:,} of the "
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


def page_of(description: Description) -> Page:
    """Return the page."""
    table, votes = description.table, description.votes
    rows = ", ".join(f"{count:,} {split}" for split, count in table.rows.items())
    ties = sum(table.ties.values())
    page = Page(
        f"Feedback: {description.name}",
        f"Votes: {rows}{f'; {ties:,} ties left out' if ties else ''}. What follows is of the training votes, "
        "unless it says otherwise.",
        footer="Written by python -m prlhf_lightning data describe.",
    )
    _headroom(page.section("How much there is to personalize"), description.finding)
    section = page.section("What users differ in")
    if isinstance(description.differences, str):
        section.text(description.differences)
    else:
        add_differences(section, differences_content(description.differences))
    _votes_a_user(page.section("Votes a user"), table, votes)
    _lengths(page.section("Lengths"), table, votes)
    _agreement(page.section("Agreement between users"), votes)
    _length_bias(page.section("Length bias"), table, votes)
    _contradictions(page.section("Contradictions"), votes)
    return page


def _headroom(section: Section, finding: Finding) -> None:
    section.text(in_words(finding), "verdict")
    found = finding.headroom
    if found is None:
        return

    views = (("a user, on average", found.by_user), ("all votes", found.by_vote))

    def draw(axes: Axes) -> None:
        axes.axvspan(-100 * SMALL, 100 * SMALL, color=LINE, alpha=0.5, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        reach = 2.0
        for height, (_, view) in enumerate(reversed(views)):
            low, gain, high = (100 * value for value in (view.low, view.gain, view.high))
            axes.plot([low, high], [height, height], color=FIRST, linewidth=3, solid_capstyle="round")
            axes.plot(gain, height, "o", color=FIRST, markersize=9)
            reach = max(reach, 1.15 * abs(low), 1.15 * abs(high))
        axes.set(xlim=(-reach, reach), ylim=(-0.6, 1.6), xlabel="gain in pair accuracy, points")
        axes.set_yticks([0, 1], [name for name, _ in reversed(views)])
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)

    section.plot(
        draw,
        alt="; ".join(
            f"{name}: {100 * view.gain:.2f} points, interval {100 * view.low:.2f} to {100 * view.high:.2f}"
            for name, view in views
        )
        + f". The shaded band of plus or minus {100 * SMALL:.0f} is next to nothing.",
        caption="What knowing the user adds, with 95% intervals; shaded: next to nothing",
        height=1.7,
    )
    section.table(
        ["change, in points", "estimate", "from", "to"],
        [[name, *map(_points, (view.gain, view.low, view.high))] for name, view in views],
        "The same in numbers",
    )
    section.table(
        ["pair accuracy of the model", "a user", "all votes", "log-loss"],
        [
            ["the same for all users", found.by_user.shared, found.by_vote.shared, found.shared_loss],
            ["with each user's own taste", found.by_user.personal, found.by_vote.personal, found.personal_loss],
            ["guessing", 0.5, 0.5, float(np.log(2))],
        ],
        f"On {found.votes:,} held-out votes of {found.users:,} users; log-loss is a user's",
    )
    section.text(
        (
            "The models see who voted on which response, not its text: one score a response (Bradley-Terry), and, for "
            f"the second, a term of user and response of rank {_ranks(found)}."
            if finding.kind == "items"
            else "Most held-out votes are on responses that no other user judged in training, so the models see what "
            "can be counted in a text "
            f"({', '.join(SURFACE_FEATURES)}): a weight for each, and, for the second, how each user deviates."
        )
        + f" Rank and penalties were chosen by cross-validation within the votes that the models "
        f"were fitted to, which hold none of the held-out ones: {finding.held_out}. The interval is a bootstrap "
        "over users. A language model, which reads the texts, may gain less, or more. " + " ".join(finding.remarks),
        "note",
    )


def _ranks(found: PersonalizationGain) -> str:
    ranks = sorted({choice.rank for choice in found.chosen})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _votes_a_user(section: Section, table: FeedbackTable, votes: Votes) -> None:
    counts = np.bincount(votes.users, minlength=table.num_users)
    counts = np.sort(counts[counts > 0])
    busiest = counts[-max(1, len(counts) // 10) :].sum() / counts.sum()
    section.facts(
        {
            "votes": len(votes),
            "users": len(counts),
            "votes of the median user": int(np.median(counts)),
            "users with fewer than 5": int((counts < 5).sum()),
            "votes by the busiest tenth": f"{busiest:.0%}",
        }
    )

    def draw(axes: Axes) -> None:
        edges = np.unique(np.rint(np.geomspace(1, counts[-1] + 1, 25))).tolist()
        axes.hist(counts, bins=edges, color=FIRST, histtype="stepfilled")
        axes.set(xscale="log", xlabel="votes of a user", ylabel="users")

    section.plot(
        draw,
        alt=f"Users by their number of votes: from {counts[0]} to {counts[-1]:,}, the median {np.median(counts):.0f}.",
        caption="How many votes users gave",
    )
    section.table(["of the users", "votes"], _quantile_rows(counts), "Votes a user, from the least to the most")


def _lengths(section: Section, table: FeedbackTable, votes: Votes) -> None:
    prompts = table.prompt_words[np.unique(table.prompts[votes.winners])]
    chosen, rejected = table.words[votes.winners], table.words[votes.losers]

    def draw(axes: Axes) -> None:
        top = max(1, np.quantile(np.concatenate([chosen, rejected]), 0.99))
        edges = np.linspace(0, top, min(30, int(top) + 1)).tolist()
        for values, color, label in ((chosen, FIRST, "chosen"), (rejected, SECOND, "rejected")):
            axes.hist(np.minimum(values, top), bins=edges, histtype="step", color=color, label=label, linewidth=1.8)
        axes.set(xlabel="words", ylabel="votes")
        axes.legend()

    section.plot(
        draw,
        alt=f"Words of responses: chosen ones have {np.median(chosen):.0f} in the median, rejected ones "
        f"{np.median(rejected):.0f}.",
        caption="Words of the responses, one a vote (the longest hundredth at the right end)",
    )
    columns = [np.percentile(values, _QUANTILES) for values in (prompts, chosen, rejected)]
    section.table(
        ["shortest to longest", "prompts", "chosen", "rejected"],
        [[_quantile_name(q), *(int(column[i]) for column in columns)] for i, q in enumerate(_QUANTILES)],
        f"Words of the prompts, of which there are {len(prompts):,}, and of the responses, one a vote",
    )


def _agreement(section: Section, votes: Votes) -> None:
    rate = agreement_between_users(votes)
    if not rate.count:
        section.text("No pair of responses was judged by two users, so whether they agree cannot be seen.", "verdict")
        return
    section.text(
        f"On the {rate.count:,} pairs of responses that several users judged, two of them agree {rate.value:.1%} of "
        f"the time (95% interval {_interval(rate)}); votes at random would agree 50% of the time. "
        f"Beyond chance that is {max(0.0, 2 * rate.value - 1):.2f} of what there can be (0 = chance, 1 = all agree). "
        "Users disagree because they differ, or because a vote is hasty: agreement cannot tell these apart, what there "
        "is to personalize can."
    )
    voters = np.unique(np.stack([votes.pairs, votes.users]), axis=1)[0]
    sizes = np.unique(voters, return_counts=True)[1]
    bounds = [(1, 1), (2, 2), (3, 5), (6, 10), (11, int(1e18))]
    section.table(
        ["users who judged the pair", "pairs"],
        [
            [f"{low}" if low == high else (f"{low} to {high}" if high < 1e18 else f"{low} or more"), int(count)]
            for low, high in bounds
            if (count := ((sizes >= low) & (sizes <= high)).sum())
        ],
        "How many users judged a pair of responses",
    )


def _length_bias(section: Section, table: FeedbackTable, votes: Votes) -> None:
    difference = table.characters[votes.winners] - table.characters[votes.losers]
    differs = difference != 0
    if not differs.any():
        section.text("All pairs are of two responses of one length.")
        return
    users = votes.users[differs]
    longer = np.bincount(users, weights=difference[differs] > 0, minlength=table.num_users).astype(float)
    total = np.bincount(users, minlength=table.num_users).astype(float)
    overall, spread = float(longer.sum() / total.sum()), spread_between_users(longer, total)
    section.text(
        f"The longer of two responses (in characters) wins {overall:.1%} of the votes. Beyond what the chance of few "
        f"votes explains, users differ in that by a standard deviation of {100 * spread:.1f} points"
        + ("." if spread else ": not at all.")
    )
    regular = total >= _VOTES_FOR_A_RATE
    if not regular.any():
        section.text(f"No user has {_VOTES_FOR_A_RATE} votes, so shares of single users say little.", "note")
        return
    shares = longer[regular] / total[regular]
    alike = _shares_if_all_were_alike(total[regular], overall)

    def draw(axes: Axes) -> None:
        edges = np.linspace(0, 1, 21).tolist()
        axes.hist(_spread(shares, total[regular]), bins=edges, color=FIRST, histtype="stepfilled", label="users")
        weights = np.full(len(alike), len(shares) / len(alike))
        axes.hist(
            alike, bins=edges, weights=weights, histtype="step", color=SECOND, linewidth=1.8, label="if all were alike"
        )
        axes.set(xlabel="share of votes that the longer response won", ylabel="users", xlim=(0, 1))
        axes.legend()

    section.plot(
        draw,
        alt=f"Users by how often the longer response won: from {shares.min():.0%} to {shares.max():.0%}, the median "
        f"{np.median(shares):.0%}; beside it what chance alone would show.",
        caption=f"How often the longer one wins, for users with {_VOTES_FOR_A_RATE} votes or more",
    )
    section.table(
        ["of the users", "the longer one wins"],
        [
            [_quantile_name(q), f"{value:.0%}"]
            for q, value in zip(_QUANTILES, np.percentile(shares, _QUANTILES), strict=True)
        ],
        f"The same for {len(shares):,} users, from the least to the most",
    )


def _contradictions(section: Section, votes: Votes) -> None:
    again, rounds = contradictions(votes), cycles(votes)
    kinds = (("changed their mind on a pair", again, "50%"), ("a over b over c over a", rounds, "25%"))
    rows: list[list[Cell]] = [
        [name, rate.count, f"{rate.value:.1%}" if rate.count else "-", _interval(rate), chance]
        for name, rate, chance in kinds
    ]
    columns = ["within one user", "occasions", "share", "95% interval", "at random"]
    section.table(columns, rows, "Votes that contradict one another")
    section.text(
        "An occasion is a user and a pair of responses with two votes or more, or three responses of which the user "
        "judged each pair. None is usual where votes were made from ratings: these cannot contradict one another.",
        "note",
    )


def _shares_if_all_were_alike(totals: _Floats, rate: float) -> _Floats:
    """Return shares of users who all have the same true rate, several draws a user for a smooth outline."""
    repeated = np.tile(totals, max(1, 20_000 // len(totals)))
    return _spread(np.random.default_rng(0).binomial(repeated.astype(np.int64), rate) / repeated, repeated)


def _spread(shares: _Floats, totals: _Floats) -> _Floats:
    """Spread each share evenly over what would be rounded to it, lest bars hold now two and now three values."""
    moved: _Floats = shares + np.random.default_rng(0).uniform(-0.5, 0.5, len(shares)) / totals
    return moved.clip(0, 1)


def _points(change: float) -> str:
    return f"{round(100 * change, 1) + 0.0:+.1f}"  # adding zero makes minus zero one of plus


def _interval(rate: Rate) -> str:
    return f"{rate.low:.1%} to {rate.high:.1%}" if rate.count else "-"


def _quantile_rows(values: npt.NDArray[np.int64]) -> list[list[Cell]]:
    return [
        [_quantile_name(q), int(value)] for q, value in zip(_QUANTILES, np.percentile(values, _QUANTILES), strict=True)
    ]


def _quantile_name(quantile: int) -> str:
    return {0: "least", 50: "median", 100: "most"}.get(quantile, f"{quantile}%")
