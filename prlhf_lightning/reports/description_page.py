"""The page that `data describe` writes, section by section, from the content of its JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prlhf_lightning.analysis.feedback_table import SURFACE_FEATURES
from prlhf_lightning.analysis.personalization_gain import SMALL
from prlhf_lightning.reports.description import QUANTILES, VOTES_FOR_A_RATE, points
from prlhf_lightning.reports.differences import add_differences
from prlhf_lightning.reports.html import FIRST, LINE, MUTED, SECOND, Cell, Page, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def page_of(content: Mapping[str, Any]) -> Page:
    """Return the page of a description.

    Args:
        content: See `description_content`, or what `json.load` returns of a `description.json`.
    """
    rows = ", ".join(f"{count:,} {split}" for split, count in content["rows"].items())
    ties = content["ties"]
    page = Page(
        f"Feedback: {content['title']}",
        f"Votes: {rows}{f'; {ties:,} ties left out' if ties else ''}. What follows is of the training votes, "
        "unless it says otherwise.",
        footer="Written by python -m prlhf_lightning data describe.",
    )
    _gain(page.section("How much there is to personalize"), content)
    section = page.section("What users differ in")
    if content["differences"] is None:
        section.text(content["unknown"]["differences"])
    else:
        add_differences(section, content["differences"])
    _votes_a_user(page.section("Votes a user"), content["votes_by_user"])
    _lengths(page.section("Lengths"), content["words"])
    _agreement(page.section("Agreement between users"), content["agreement"])
    _length_bias(page.section("Length bias"), content["length_bias"])
    _contradictions(page.section("Contradictions"), content["contradictions"])
    return page


def _gain(section: Section, content: Mapping[str, Any]) -> None:
    section.text(content["in_short"], "verdict")
    found = content["gain"]
    if found is None:
        return

    parts = ("by_user", "by_vote")
    views = (("a user, on average", found["by_user"]), ("all votes", found["by_vote"]))

    def draw(axes: Axes) -> None:
        axes.axvspan(-100 * SMALL, 100 * SMALL, color=LINE, alpha=0.5, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        reach = 2.0
        for height, (_, view) in enumerate(reversed(views)):
            low, gain, high = (100 * view[name] for name in ("low", "gain", "high"))
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
            f"{name}: {100 * view['gain']:.2f} points, interval {100 * view['low']:.2f} to {100 * view['high']:.2f}"
            for name, view in views
        )
        + f". The shaded band of plus or minus {100 * SMALL:.0f} is next to nothing.",
        caption="What knowing the user adds, with 95% intervals; shaded: next to nothing",
        height=1.7,
    )
    section.table(
        ["change, in points", "estimate", "from", "to"],
        [[name, *(points(view[end]) for end in ("gain", "low", "high"))] for name, view in views],
        "The same in numbers",
    )
    section.table(
        ["pair accuracy of the model", "a user", "all votes", "log-loss"],
        [
            ["the same for all users", *(found[part]["shared"] for part in parts), found["shared_loss"]],
            ["with each user's own taste", *(found[part]["personal"] for part in parts), found["personal_loss"]],
            ["guessing", 0.5, 0.5, float(np.log(2))],
        ],
        f"On {found['votes']:,} held-out votes of {found['users']:,} users; log-loss is a user's",
    )
    section.text(
        (
            "The models see who voted on which response, not its text: one score a response (Bradley-Terry), and, for "
            f"the second, a term of user and response of rank {_ranks(found)}."
            if found["kind"] == "items"
            else "Most held-out votes are on responses that no other user judged in training, so the models see what "
            "can be counted in a text "
            f"({', '.join(SURFACE_FEATURES)}): a weight for each, and, for the second, how each user deviates."
        )
        + f" Rank and penalties were chosen by cross-validation within the votes that the models "
        f"were fitted to, which hold none of the held-out ones: {found['held_out']}. The interval is a bootstrap "
        "over users. A language model, which reads the texts, may gain less, or more. " + " ".join(found["remarks"]),
        "note",
    )


def _ranks(found: Mapping[str, Any]) -> str:
    ranks = sorted({choice["rank"] for choice in found["chosen"]})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _votes_a_user(section: Section, found: Mapping[str, Any]) -> None:
    counts = np.repeat(found["votes"], found["users"])
    busiest = counts[-max(1, len(counts) // 10) :].sum() / counts.sum()
    section.facts(
        {
            "votes": int(counts.sum()),
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


def _lengths(section: Section, found: Mapping[str, Any]) -> None:
    quantiles, histogram = found["quantiles"], found["histogram"]

    def draw(axes: Axes) -> None:
        for name, color in (("chosen", FIRST), ("rejected", SECOND)):
            _bars(axes, histogram["edges"], histogram[name], histtype="step", color=color, label=name, linewidth=1.8)
        axes.set(xlabel="words", ylabel="votes")
        axes.legend()

    middle = QUANTILES.index(50)
    section.plot(
        draw,
        alt=f"Words of responses: chosen ones have {quantiles['chosen'][middle]:.0f} in the median, rejected ones "
        f"{quantiles['rejected'][middle]:.0f}.",
        caption="Words of the responses, one a vote (the longest hundredth at the right end)",
    )
    section.table(
        ["shortest to longest", *quantiles],
        [[_quantile_name(q), *(int(column[i]) for column in quantiles.values())] for i, q in enumerate(QUANTILES)],
        f"Words of the prompts, of which there are {found['prompts']:,}, and of the responses, one a vote",
    )


def _agreement(section: Section, found: Mapping[str, Any]) -> None:
    if not found["count"]:
        section.text("No pair of responses was judged by two users, so whether they agree cannot be seen.", "verdict")
        return
    share = found["value"]
    section.text(
        f"On the {found['count']:,} pairs of responses that several users judged, two of them agree {share:.1%} of "
        f"the time (95% interval {_interval(found)}); votes at random would agree 50% of the time. "
        f"Beyond chance that is {max(0.0, 2 * share - 1):.2f} of what there can be (0 = chance, 1 = all agree). "
        "Users disagree because they differ, or because a vote is hasty: agreement cannot tell these apart, what there "
        "is to personalize can."
    )
    sizes, pairs = (np.array(found["pairs_by_users"][name]) for name in ("users", "pairs"))
    bounds = [(1, 1), (2, 2), (3, 5), (6, 10), (11, int(1e18))]
    section.table(
        ["users who judged the pair", "pairs"],
        [
            [f"{low}" if low == high else (f"{low} to {high}" if high < 1e18 else f"{low} or more"), int(count)]
            for low, high in bounds
            if (count := pairs[(sizes >= low) & (sizes <= high)].sum())
        ],
        "How many users judged a pair of responses",
    )


def _length_bias(section: Section, found: Mapping[str, Any] | None) -> None:
    if found is None:
        section.text("All pairs are of two responses of one length.")
        return
    section.text(
        f"The longer of two responses (in characters) wins {found['longer_wins']:.1%} of the votes. Beyond what the "
        "chance of few votes explains, users differ in that by a standard deviation of "
        f"{100 * found['spread']:.1f} points" + ("." if found["spread"] else ": not at all.")
    )
    users = found["users"]
    if users is None:
        section.text(f"No user has {VOTES_FOR_A_RATE} votes, so shares of single users say little.", "note")
        return
    quantiles, histogram = users["quantiles"], users["histogram"]

    def draw(axes: Axes) -> None:
        edges = histogram["edges"]
        _bars(axes, edges, histogram["users"], color=FIRST, histtype="stepfilled", label="users")
        _bars(
            axes, edges, histogram["if_alike"], histtype="step", color=SECOND, linewidth=1.8, label="if all were alike"
        )
        axes.set(xlabel="share of votes that the longer response won", ylabel="users", xlim=(0, 1))
        axes.legend()

    section.plot(
        draw,
        alt=f"Users by how often the longer response won: from {quantiles[0]:.0%} to {quantiles[-1]:.0%}, the median "
        f"{quantiles[QUANTILES.index(50)]:.0%}; beside it what chance alone would show.",
        caption=f"How often the longer one wins, for users with {VOTES_FOR_A_RATE} votes or more",
    )
    section.table(
        ["of the users", "the longer one wins"],
        [[_quantile_name(q), f"{value:.0%}"] for q, value in zip(QUANTILES, quantiles, strict=True)],
        f"The same for {users['count']:,} users, from the least to the most",
    )


def _bars(axes: Axes, edges: Sequence[float], counts: Sequence[float], **how: Any) -> None:
    """Draw a histogram from its counts."""
    axes.hist(edges[:-1], bins=list(edges), weights=counts, **how)


def _contradictions(section: Section, found: Mapping[str, Any]) -> None:
    again, rounds = found["changed_mind"], found["cycles"]
    kinds = (("changed their mind on a pair", again, "50%"), ("a over b over c over a", rounds, "25%"))
    rows: list[list[Cell]] = [
        [name, rate["count"], f"{rate['value']:.1%}" if rate["count"] else "-", _interval(rate), chance]
        for name, rate, chance in kinds
    ]
    columns = ["within one user", "occasions", "share", "95% interval", "at random"]
    section.table(columns, rows, "Votes that contradict one another")
    section.text(
        "An occasion is a user and a pair of responses with two votes or more, or three responses of which the user "
        "judged each pair. None is usual where votes were made from ratings: these cannot contradict one another.",
        "note",
    )


def _interval(rate: Mapping[str, Any]) -> str:
    return f"{rate['low']:.1%} to {rate['high']:.1%}" if rate["count"] else "-"


def _quantile_rows(values: npt.NDArray[np.int64]) -> list[list[Cell]]:
    return [
        [_quantile_name(q), int(value)] for q, value in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)
    ]


def _quantile_name(quantile: int) -> str:
    return {0: "least", 50: "median", 100: "most"}.get(quantile, f"{quantile}%")
