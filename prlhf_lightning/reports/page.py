"""The page that `report` writes, section by section, from the content of `report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prlhf_lightning.adaptation import ColdStartPoint
from prlhf_lightning.analysis.win_rate import UserMean
from prlhf_lightning.data.conversations import message_text
from prlhf_lightning.data.records import Text
from prlhf_lightning.reports import plots
from prlhf_lightning.reports.answers import GENERIC, OWN
from prlhf_lightning.reports.differences import add_differences
from prlhf_lightning.reports.html import Cell, Page, Section
from prlhf_lightning.reports.json_file import number
from prlhf_lightning.reports.words import ALIKE, interval, mean_of, points

_Content: TypeAlias = Mapping[str, Any]
_LISTED = 10
_PROMPTS = 4
_CHARACTERS = 2000
_TAX_CAPTION = (
    "Means over seen users: accuracy on their validation pairs; log-probability a token of the answers "
    "they chose; true utility, and well-formedness, of what is written for them (known of simulated users only)"
)


def page_of(content: _Content) -> Page:
    """Return the page of a report.

    Args:
        content: See `report_content`, or what `json.load` returns of a `report.json`.
    """
    unknown = content["unknown"]
    page = Page(
        content["title"],
        content["model"],
        footer="Written by prlhf_lightning report. Intervals are of 95%; those over users are bootstraps.",
    )
    section = page.section("In short")
    section.text(content["in_short"], "verdict")
    add_facts(section, content)
    section = page.section("Learning curves")
    if content["learning_curves"]:
        plots.learning_curves(section, content["learning_curves"])
    else:
        section.text(f"Not known: {unknown['learning_curves']}", "note")
    add_users(page.section("Users"), content)
    add_new_users(page.section("New users"), content)
    section = page.section("What users differ in")
    if content["differences"] is None:
        section.text(f"Not known: {unknown.get('differences', '')}")
    else:
        add_differences(section, content["differences"])
    _map(page.section("Map of users"), content)
    _tax(page.section("What personalization costs"), content)
    _win_rates(page.section("Win rates"), content)
    _answers(page.section("What it writes"), content)
    return page


def add_new_users(section: Section, content: _Content) -> None:
    """Add how well new users are learned from few pairs."""
    if content["cold_start"] is None:
        section.text(f"No curve: {content['unknown'].get('cold_start', '')}")
        return
    curve = [ColdStartPoint(**{**point, "interval": number(point["interval"])}) for point in content["cold_start"]]
    plots.cold_start_curve(section, curve)
    section.text(_same_users(curve), "note")


def _same_users(points: Sequence[ColdStartPoint]) -> str:
    last = points[-1]
    return (
        f"All points are of the same {last.users:,} users, those with {last.pairs:,} pairs to learn from; new users "
        "with fewer are left out."
    )


def add_facts(section: Section, content: _Content) -> None:
    """Add the most important numbers."""
    facts: dict[str, Cell] = {}
    if votes := content["votes"]:
        facts |= {"users": votes["users"], "training votes": votes["votes"]}
    if seen := content["pair_accuracy"].get("seen"):
        facts["accuracy, mean over seen users"] = number(seen["own"]["value"])
        facts["accuracy, worst tenth of them"] = number(seen["worst_tenth"]["accuracy"])
        if content["personalizes"]:
            facts["same pairs, generic user"] = number(seen["generic"]["value"])
    if unseen := content["pair_accuracy"].get("unseen"):
        facts["accuracy, unseen users"] = number(unseen["own"]["value"])
    if facts:
        section.facts(facts)


def add_users(section: Section, content: _Content) -> None:
    """Add the accuracies of users."""
    if not content["pair_accuracy"]:
        section.text(content["unknown"].get("no_scores", "There are no validation pairs."))
        _logged_users(section, content["users_seen"] or [])
        return
    rows: list[list[Cell]] = []
    for name, scores in content["pair_accuracy"].items():
        own, generic, worst = mean_of(scores["own"]), mean_of(scores["generic"]), scores["worst_tenth"]
        rows.append([f"{name} users", own.users, own.count, *_three(own)])
        if name == "seen":
            rows.append(["worst tenth of them", worst["users"], worst["pairs"], number(worst["accuracy"]), "-", "-"])
            if content["personalizes"]:
                rows.append(["same pairs, generic user", generic.users, generic.count, *_three(generic)])
    seen = content["pair_accuracy"].get("seen")
    if seen:
        plots.accuracy_by_votes(section, seen["by_user"])
    section.table(
        ["pair accuracy", "users", "pairs", "mean", "low", "high"],
        rows,
        "On validation pairs: means over users, with intervals by a bootstrap over users",
    )
    if seen:
        lowest = sorted(seen["by_user"], key=lambda row: number(row["accuracy"]))[:_LISTED]
        section.table(
            ["user", "votes given", "pairs", "accuracy", "low", "high"],
            [
                [
                    row["user"] or "-",
                    row["votes"],
                    row["pairs"],
                    *(number(row[name]) for name in ("accuracy", "low", "high")),
                ]
                for row in lowest
            ],
            "The users whom the model serves worst, with Wilson intervals",
        )
        section.text(
            "The worst tenth is chosen by its accuracy, so a part of it is bad luck: with few pairs a user, some are "
            "at the bottom by chance. Unseen users are served as the generic user.",
            "note",
        )


def _logged_users(section: Section, rows: Sequence[_Content]) -> None:
    """Add what the last validation of the run wrote about its users, where nothing could be scored anew."""
    if not rows:
        return
    section.table(
        list(rows[0]),
        [[row["user"] or "-", *(number(row[name]) for name in rows[0] if name != "user")] for row in rows[:_LISTED]],
        "The users whom the model served worst in the run's last validation (users_seen.csv)",
    )


def _map(section: Section, content: _Content) -> None:
    found = content["map"]
    if found is None:
        section.text(f"No map: {content['unknown'].get('map', '')}")
        return
    plots.user_map(section, found)
    section.text(
        "Users who stand close to one another have similar soft prompts. "
        + (f"Colors and shapes: {found['groups']}. " if found["groups"] else "")
        + f"The two axes show {sum(found['explained']):.0%} of how the prompts vary.",
        "note",
    )


def _tax(section: Section, content: _Content) -> None:
    if content["writers"] is None:
        section.text(content["unknown"].get("no_scores", "There are no validation pairs of seen users."))
        return
    rows: list[list[Cell]] = []
    for writer, row in content["writers"].items():
        accuracy = row["accuracy"] or {"value": None}
        within = interval(mean_of(accuracy), ".3f") if "low" in accuracy else "-"
        numbers = (number(row[name]) for name in ("log_prob", "utility", "well_formed"))
        rows.append([writer, number(accuracy["value"]), within, *numbers])
    section.text(_tax_in_words(content))
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


def _tax_in_words(content: _Content) -> str:
    if not content["personalizes"]:
        return f"{ALIKE[content['reads_text']]} So there is no price of telling them apart by their votes."
    if content["baseline"]:
        before = number(content["baseline"]["value"])
    else:
        before = number(((content["comparison"] or {}).get("vanilla") or {}).get("val/seen/accuracy_user_mean"))
    generic, price = number(content["pair_accuracy"]["seen"]["generic"]["value"]), content["price"]
    said = (
        f"The generic user ranks {generic:.3f} of the seen users' pairs as they did, the baseline without users "
        f"{before:.3f}: a price of {points(mean_of(price)) if price else f'{100 * (before - generic):+.1f} points'}."
        + ("" if price else " For its interval, name the baseline's checkpoint with --baseline.")
        if before == before
        else f"The generic user ranks {generic:.3f} of the seen users' pairs as they did. What a model without users "
        "would have reached is not known: train one (fit --train_baseline true), or name one with --baseline."
    )
    if content["drift"]:
        drift = mean_of(content["drift"])
        said += (
            f" The log-probability a token that it gives to the chosen answers is {drift.value:+.3f} away from where "
            f"it was before training ({interval(drift, '+.3f')})."
        )
    if content["answers"] and (well := content["answers"]["well_formed"]):
        said += (
            f" Of what it writes for users {well[OWN]:.1%} is well-formed, for the generic user {well[GENERIC]:.1%}."
        )
    return said


def _win_rates(section: Section, content: _Content) -> None:
    found = content["win_rates"]
    if found is None:
        section.text(f"No win rates: {content['unknown'].get('win_rates', '')}")
        return
    counted = [rate for rate in found["against"] if rate["rate"]["count"]]
    section.text(f"Judge: {found['judge']}. {found['caveat']}".strip())
    if counted:
        plots.win_bars(
            section,
            [rate["against"] for rate in counted],
            [_shares(rate) for rate in counted],
            [mean_of(rate["rate"]) for rate in counted],
        )
    section.table(
        ["against", "win rate", "low", "high", "won", "tie", "lost", "error"],
        [
            [r["against"], *_three(mean_of(r["rate"])), r["wins"], r["ties"], r["losses"], sum(r["errors"].values())]
            for r in found["against"]
        ],
        "What is written for a user, against others; ties count half, errors not at all",
    )
    if reasons := dict.fromkeys(why for rate in found["against"] for why in rate["errors"]):
        listed = "; ".join(f"{why} ({sum(r['errors'].get(why, 0) for r in found['against']):,})" for why in reasons)
        section.text(f"Questions without a verdict: {listed}.", "verdict")
    said = "The interval is for users like these, with these prompts."
    if differing := sum(rate["inconsistent"] for rate in found["against"]):
        said += (
            f" {differing:,} of the ties are questions to which the judge gave different verdicts in the two orders."
        )
    section.text(said, "note")


def _shares(rate: _Content) -> tuple[float, float, float]:
    total = rate["wins"] + rate["ties"] + rate["losses"]
    return rate["wins"] / total, rate["ties"] / total, rate["losses"] / total


def _answers(section: Section, content: _Content) -> None:
    answers = content["answers"]
    if answers is None:
        section.text(f"Nothing is shown: {content['unknown'].get('answers', '')}")
        return
    if "texts" not in answers:
        section.text("Nothing is shown: it was asked for by --show_answers false.")
        return
    shown = answers["shown"]
    for p, prompt in enumerate(answers["prompts"][:_PROMPTS]):
        quotes = []
        for user in shown:
            label, about = answers["users"][user["row"]] or "-", user["about"]
            text = _cut(answers["texts"][OWN][user["row"]][p])
            quotes.append((f"for {label} ({_cut(about)})" if about else f"for {label}", text))
        if shown:
            first = shown[0]["row"]
            # Who is read even where nobody is known.
            read = f" (told about {answers['users'][first] or '-'})" if content["reads_text"] else ""
            quotes += [
                (f"{writer}{read}", _cut(texts[first][p]))
                for writer, texts in answers["texts"].items()
                if writer != OWN
            ]
        section.quotes("Prompt:", _shown(prompt), quotes)


def _shown(prompt: Text) -> str:
    if isinstance(prompt, str):
        return _cut(prompt)
    return _cut("\n".join(f"{turn['role']}: {message_text(turn)}" for turn in prompt))


def _cut(text: str) -> str:
    if not text.strip():
        return "(empty)"
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS:,} more characters)"


def _three(mean: UserMean) -> list[Cell]:
    return [mean.value, mean.low, mean.high]
