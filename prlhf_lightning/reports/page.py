"""The page that `report` writes, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prlhf_lightning.adaptation import ColdStartPoint
from prlhf_lightning.analysis.win_rate import UserMean, user_mean
from prlhf_lightning.data.conversations import message_text
from prlhf_lightning.data.schema import Text
from prlhf_lightning.metrics import UserAccuracy
from prlhf_lightning.reports import plots
from prlhf_lightning.reports.answers import BASELINE, BEFORE, GENERIC, OWN, Answers, WinRate
from prlhf_lightning.reports.differences import Differences, add_differences
from prlhf_lightning.reports.html import Cell, Page, Section
from prlhf_lightning.reports.pairs import Scores
from prlhf_lightning.reports.run import Run
from prlhf_lightning.reports.user_map import UserMap

_LISTED = 10
_PROMPTS = 4
_CHARACTERS = 2000
_ALIKE = {False: "The model does not tell users apart.", True: "The model knows users by their texts alone."}
_TAX_CAPTION = (
    "Means over seen users: accuracy on their validation pairs; log-probability a token of the answers "
    "they chose; true utility, and well-formedness, of what is written for them (known of simulated users only)"
)


@dataclass
class Findings:
    """What a report says; what is not known is a text that says why.

    Attributes:
        title: Of the page.
        model: User model, policy and loss, in words.
        run: What the run left.
        personalizes: Whether users differ from the generic user.
        reads_text: Whether the model reads texts about users.
        scores: Validation pairs by `seen` and `unseen` users.
        no_scores: Why there are none.
        baseline: The seen users' pairs under a model without users.
        votes: Training votes of each user.
        cold_start: The curve for new users.
        differences: What users differ in, by their votes.
        followed: How closely what is written for users follows each difference.
        map: Users on a plane.
        groups: What each user on the map is colored by, and what that is.
        on_map: What each user on the map is called.
        answers: What was written.
        shown: Which users' answers stand on the page.
        show_answers: Whether any do.
        win_rates: What a judge says.
        judge: Who judges, and what to know of it.
        names: How users are called on the page.
        about: What is said of each user beside the name.
    """

    title: str
    model: str
    run: Run
    personalizes: bool = True
    reads_text: bool = False
    scores: dict[str, Scores] = field(default_factory=dict)
    no_scores: str = ""
    baseline: Scores | None = None
    votes: Mapping[str, int] = field(default_factory=dict)
    cold_start: list[ColdStartPoint] | str = ""
    differences: Differences | str = ""
    followed: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    map: UserMap | str = ""
    groups: tuple[Sequence[str], str] = ((), "")
    on_map: Sequence[str] = ()
    answers: Answers | str = ""
    shown: Sequence[int] = ()
    show_answers: bool = True
    win_rates: list[WinRate] | str = ""
    judge: tuple[str, str] = ("", "")
    names: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def page_of(found: Findings) -> Page:
    """Return the page."""
    page = Page(
        found.title,
        found.model,
        footer="Written by prlhf_lightning report. Intervals are of 95%; those over users are bootstraps.",
    )
    section = page.section("In short")
    section.text(in_words(found), "verdict")
    _facts(section, found)
    plots.learning_curves(page.section("Learning curves"), found.run)
    _users(page.section("Users"), found)
    section = page.section("New users")
    if isinstance(found.cold_start, str):
        section.text(f"No curve: {found.cold_start}")
    else:
        plots.cold_start_curve(section, found.cold_start)
        section.text(_same_users(found.cold_start), "note")
    section = page.section("What users differ in")
    if isinstance(found.differences, str):
        section.text(f"Not known: {found.differences}")
    else:
        add_differences(section, found.differences, found.followed)
    _map(page.section("Map of users"), found)
    _tax(page.section("What personalization costs"), found)
    _win_rates(page.section("Win rates"), found)
    _answers(page.section("What it writes"), found)
    return page


def _same_users(points: Sequence[ColdStartPoint]) -> str:
    last = points[-1]
    return (
        f"All points are of the same {last.users:,} users, those with {last.pairs:,} pairs to learn from; new users "
        "with fewer are left out."
    )


def gain_of(scores: Scores) -> UserMean:
    """Return what knowing the user adds to a user's pair accuracy."""
    return user_mean(scores.user_ids, (scores.own - scores.generic).double().numpy())


def price_of(found: Findings) -> UserMean | None:
    """Return what the generic user's pair accuracy falls behind the baseline's on the same pairs; None if not known."""
    seen, baseline = found.scores.get("seen"), found.baseline
    if seen is None or baseline is None or baseline.user_ids != seen.user_ids:
        return None
    return user_mean(seen.user_ids, (baseline.own - seen.generic).double().numpy())


def in_words(found: Findings) -> str:
    """Return what was found in a few sentences."""
    said = []
    seen = found.scores.get("seen")
    if seen and found.personalizes:
        gain, own, generic = gain_of(seen), _mean(seen, "own"), _mean(seen, "generic")
        if gain.low > 0:
            said.append("The model has learned what its users differ in.")
        elif gain.high < 0:
            said.append("Knowing the user makes the model worse.")
        else:
            said.append("Whether the model has learned what its users differ in cannot be told.")
        said.append(
            f"Knowing the user changes a seen user's pair accuracy by {_points(gain)}, from {generic.value:.3f} to "
            f"{own.value:.3f}."
        )
    elif seen:
        said.append(f"{_ALIKE[found.reads_text]} Its pair accuracy is {_mean(seen, 'own').value:.3f}.")
    if isinstance(found.win_rates, list):
        said += [
            f"{found.judge[0]} prefers what it writes for a user to the answer of the {rate.against} in "
            f"{rate.rate.value:.0%} of cases ({_interval(rate.rate, '.0%')}; ties count half)."
            for rate in found.win_rates
            if rate.against == GENERIC and rate.rate.count
        ]
    return " ".join(said) or found.no_scores or "There are no validation pairs of seen users to judge the model by."


def _facts(section: Section, found: Findings) -> None:
    facts: dict[str, Cell] = {}
    if found.votes:
        facts |= {"users": len(found.votes), "training votes": sum(found.votes.values())}
    if seen := found.scores.get("seen"):
        facts["accuracy, mean over seen users"] = _mean(seen, "own").value
        facts["accuracy, worst tenth of them"] = _worst(seen.by_user())
        if found.personalizes:
            facts["same pairs, generic user"] = _mean(seen, "generic").value
    if unseen := found.scores.get("unseen"):
        facts["accuracy, unseen users"] = _mean(unseen, "own").value
    if facts:
        section.facts(facts)


def _users(section: Section, found: Findings) -> None:
    if not found.scores:
        section.text(found.no_scores or "There are no validation pairs.")
        _logged_users(section, found)
        return
    rows: list[list[Cell]] = []
    for name, scores in found.scores.items():
        by_user = scores.by_user()
        rows.append([f"{name} users", len(by_user), len(scores.user_ids), *_three(_mean(scores, "own"))])
        if name == "seen":
            worst = sorted(by_user, key=lambda row: row[1].accuracy)[: max(1, len(by_user) // 10)]
            ids = {user_id for user_id, _ in worst}
            pairs = sum(user_id in ids for user_id in scores.user_ids)
            rows.append(["worst tenth of them", len(worst), pairs, _worst(by_user), "-", "-"])
            if found.personalizes:
                generic = _mean(scores, "generic")
                rows.append(["same pairs, generic user", len(by_user), len(scores.user_ids), *_three(generic)])
    seen = found.scores.get("seen")
    if seen:
        plots.accuracy_by_votes(section, seen.by_user(), found.votes)
    section.table(
        ["pair accuracy", "users", "pairs", "mean", "low", "high"],
        rows,
        "On validation pairs: means over users, with intervals by a bootstrap over users",
    )
    if seen:
        lowest = sorted(seen.by_user(), key=lambda row: (row[1].accuracy, row[0]))[:_LISTED]
        section.table(
            ["user", "votes given", "pairs", "accuracy", "low", "high"],
            [
                [
                    found.names.get(user_id, user_id),
                    found.votes.get(user_id, 0),
                    row.pairs,
                    row.accuracy,
                    row.low,
                    row.high,
                ]
                for user_id, row in lowest
            ],
            "The users whom the model serves worst, with Wilson intervals",
        )
        section.text(
            "The worst tenth is chosen by its accuracy, so a part of it is bad luck: with few pairs a user, some are "
            "at the bottom by chance. Unseen users are served as the generic user.",
            "note",
        )


def _logged_users(section: Section, found: Findings) -> None:
    """Add what the last validation of the run wrote about its users, where nothing could be scored anew."""
    if not found.run.users:
        return
    columns = [name for name in found.run.users[0] if name != "user_id"]
    value = "auc" if "auc" in columns else "accuracy"
    known = [row for row in found.run.users if isinstance(row.get(value), float) and row[value] == row[value]]
    section.table(
        ["user", *columns],
        [
            [found.names.get(str(row["user_id"]), "-"), *(row[name] for name in columns)]
            for row in sorted(known, key=lambda row: float(row[value]))[:_LISTED]
        ],
        "The users whom the model served worst in the run's last validation (users_seen.csv)",
    )


def _map(section: Section, found: Findings) -> None:
    if isinstance(found.map, str):
        section.text(f"No map: {found.map}")
        return
    groups, what = found.groups
    plots.user_map(section, found.map, groups, found.on_map)
    section.text(
        "Users who stand close to one another have similar soft prompts. "
        + (f"Colors and shapes: {what}. " if what else "")
        + f"The two axes show {sum(found.map.explained):.0%} of how the prompts vary.",
        "note",
    )


def _tax(section: Section, found: Findings) -> None:
    seen, compared = found.scores.get("seen"), found.run.comparison.get("vanilla", {})
    answers = found.answers if isinstance(found.answers, Answers) else None
    if not seen:
        section.text(found.no_scores or "There are no validation pairs of seen users.")
        return
    rows: list[list[Cell]] = []
    for writer in (OWN, GENERIC, BASELINE, BEFORE):
        scores = found.baseline if writer == BASELINE else seen
        key = {OWN: "own", GENERIC: "generic", BASELINE: "own", BEFORE: "reference"}[writer]
        if writer == GENERIC and not found.personalizes:
            continue
        if scores is None or key not in scores.log_probs:
            if writer == BASELINE and compared:
                accuracy, well = compared.get("val/seen/accuracy_user_mean"), compared.get("well_formed")
                cells = (np.nan if cell is None else cell for cell in (None, compared.get("utility"), well))
                rows.append([f"{writer} (comparison.json)", np.nan if accuracy is None else accuracy, "-", *cells])
            continue
        if writer == BEFORE:
            accuracy, within = np.nan, "-"
        else:
            mean = _mean(scores, key)
            accuracy, within = mean.value, _interval(mean, ".3f")
        likely = user_mean(scores.user_ids, scores.log_probs[key].double().numpy()).value
        utility = answers.utility[writer].value if answers and writer in answers.utility else np.nan
        well = answers.well_formed[writer] if answers and writer in answers.well_formed else np.nan
        rows.append([writer, accuracy, within, likely, utility, well])
    section.text(_tax_in_words(found, seen))
    columns = ["written", "pair accuracy", "95% interval", "log-prob", "utility", "well-formed"]
    kept = [c for c in range(len(columns)) if any(row[c] == row[c] and row[c] != "-" for row in rows)]
    section.table([columns[c] for c in kept], [[row[c] for c in kept] for row in rows], _TAX_CAPTION)
    section.text(
        "The generic user is what the model is to somebody whom it does not know. Where it falls behind a baseline "
        "that was trained on the same votes without users (--baseline), personalization has a price. A log-probability "
        "below that of the model before training means that even the chosen answers have become less likely: usual "
        "for DPO, a sign of decay where it is large.",
        "note",
    )


def _tax_in_words(found: Findings, seen: Scores) -> str:
    if not found.personalizes:
        return f"{_ALIKE[found.reads_text]} So there is no price of telling them apart by their votes."
    key = "accuracy_user_mean"
    if found.baseline is not None:
        before = _mean(found.baseline, "own").value
    else:
        before = found.run.comparison.get("vanilla", {}).get(f"val/seen/{key}", np.nan)
    generic, price = _mean(seen, "generic").value, price_of(found)
    said = (
        f"The generic user ranks {generic:.3f} of the seen users' pairs as they did, the baseline without users "
        f"{before:.3f}: a price of {_points(price) if price else f'{100 * (before - generic):+.1f} points'}."
        + ("" if price else " For its interval, name the baseline's checkpoint with --baseline.")
        if before == before
        else f"The generic user ranks {generic:.3f} of the seen users' pairs as they did. What a model without users "
        "would have reached is not known: train one (fit --train_baseline true), or name one with --baseline."
    )
    if "reference" in seen.log_probs:
        change = (seen.log_probs["generic"] - seen.log_probs["reference"]).double().numpy()
        drift = user_mean(seen.user_ids, change)
        said += (
            f" The log-probability a token that it gives to the chosen answers is {drift.value:+.3f} away from where "
            f"it was before training ({_interval(drift, '+.3f')})."
        )
    if isinstance(found.answers, Answers) and (well := found.answers.well_formed):
        said += (
            f" Of what it writes for users {well[OWN]:.1%} is well-formed, for the generic user {well[GENERIC]:.1%}."
        )
    return said


def _win_rates(section: Section, found: Findings) -> None:
    if isinstance(found.win_rates, str):
        section.text(f"No win rates: {found.win_rates}")
        return
    judge, caveat = found.judge
    counted = [rate for rate in found.win_rates if rate.rate.count]
    section.text(f"Judge: {judge}. {caveat}".strip())
    if counted:
        totals = [rate.wins + rate.ties + rate.losses for rate in counted]
        plots.win_bars(
            section,
            [rate.against for rate in counted],
            [(r.wins / n, r.ties / n, r.losses / n) for r, n in zip(counted, totals, strict=True)],
            [rate.rate for rate in counted],
        )
    section.table(
        ["against", "win rate", "low", "high", "won", "tie", "lost", "error"],
        [[r.against, *_three(r.rate), r.wins, r.ties, r.losses, sum(r.errors.values())] for r in found.win_rates],
        "What is written for a user, against others; ties count half, errors not at all",
    )
    if reasons := dict.fromkeys(why for r in found.win_rates for why in r.errors):
        listed = "; ".join(f"{why} ({sum(r.errors.get(why, 0) for r in found.win_rates):,})" for why in reasons)
        section.text(f"Questions without a verdict: {listed}.", "verdict")
    said = "The interval is for users like these, with these prompts."
    if differing := sum(r.inconsistent for r in found.win_rates):
        said += (
            f" {differing:,} of the ties are questions to which the judge gave different verdicts in the two orders."
        )
    section.text(said, "note")


def _answers(section: Section, found: Findings) -> None:
    if isinstance(found.answers, str):
        section.text(f"Nothing is shown: {found.answers}")
        return
    if not found.show_answers:
        section.text("Nothing is shown: it was asked for by --show_answers false.")
        return
    answers = found.answers
    for p in range(min(_PROMPTS, len(answers.prompts))):
        quotes = []
        for u in found.shown:
            person = answers.people[u]
            label = found.names.get(person.user_id, person.user_id)
            about = found.about.get(person.user_id, "")
            quotes.append((f"for {label} ({_cut(about)})" if about else f"for {label}", _cut(answers.texts[OWN][u][p])))
        if found.shown:
            first = found.names.get(answers.people[found.shown[0]].user_id, "")
            read = f" (told about {first})" if found.reads_text else ""  # who is read even where nobody is known
            quotes += [
                (f"{writer}{read}", _cut(texts[found.shown[0]][p]))
                for writer, texts in answers.texts.items()
                if writer != OWN
            ]
        section.quotes("Prompt:", _shown(answers.prompts[p]), quotes)


def _shown(prompt: Text) -> str:
    if isinstance(prompt, str):
        return _cut(prompt)
    return _cut("\n".join(f"{turn['role']}: {message_text(turn)}" for turn in prompt))


def _cut(text: str) -> str:
    if not text.strip():
        return "(empty)"
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS:,} more characters)"


def _mean(scores: Scores, whose: str) -> UserMean:
    return user_mean(scores.user_ids, getattr(scores, whose).double().numpy())


def _worst(rows: Sequence[tuple[str, UserAccuracy]]) -> float:
    ordered = sorted(row.accuracy for _, row in rows)
    return float(np.mean(ordered[: max(1, len(ordered) // 10)]))


def _three(mean: UserMean) -> list[Cell]:
    return [mean.value, mean.low, mean.high]


def _points(gain: UserMean) -> str:
    return f"{100 * gain.value:+.1f} points ({_interval(gain, '+.1f', 100)})"


def _interval(mean: UserMean, form: str, scale: float = 1) -> str:
    if mean.low != mean.low:
        return "one user, so no interval"
    return f"{scale * mean.low:{form}} to {scale * mean.high:{form}}"
