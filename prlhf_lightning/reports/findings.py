"""Findings of a report, and their JSON form: the content of `report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prlhf_lightning.adaptation import ColdStartPoint
from prlhf_lightning.analysis.win_rate import UserMean, user_mean
from prlhf_lightning.reports.answers import BASELINE, BEFORE, GENERIC, OWN, Answers, WinRate
from prlhf_lightning.reports.differences import Differences, differences_content
from prlhf_lightning.reports.json_file import finite
from prlhf_lightning.reports.pairs import Scores
from prlhf_lightning.reports.run import Run
from prlhf_lightning.reports.user_map import UserMap
from prlhf_lightning.reports.words import ALIKE, interval, points

FORMAT = 1
_CURVES = (
    "train/loss",
    "val/seen/loss",
    "val/unseen/loss",
    *(
        name.format(headline)
        for headline in ("accuracy", "auc")
        for name in ("val/seen/{}", "val/seen/{}_worst_decile", "val/seen/generic_{}", "val/unseen/{}")
    ),
)


@dataclass
class Findings:
    """Findings of a report; an unknown value is a text with the reason.

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


def report_content(found: Findings) -> dict[str, Any]:
    """Return the findings as JSON values, with users named as on the page.

    What is not known is None, and `unknown` says why. Numbers that are not finite are None too.
    """
    seen = found.scores.get("seen")
    content = {
        "format": FORMAT,
        "title": found.title,
        "model": found.model,
        "personalizes": found.personalizes,
        "reads_text": found.reads_text,
        "in_short": in_words(found),
        "votes": {"users": len(found.votes), "votes": sum(found.votes.values())} if found.votes else None,
        "learning_curves": _curves(found.run),
        "pair_accuracy": {name: _accuracy(found, scores) for name, scores in found.scores.items()},
        "users_seen": _users_seen(found),
        "gain": asdict(_gain(seen)) if seen and found.personalizes else None,
        "price": asdict(price) if (price := _price(found)) else None,
        "drift": _drift(seen) if seen else None,
        "baseline": asdict(_mean(found.baseline, "own")) if found.baseline else None,
        "comparison": found.run.comparison or None,
        "writers": _writers(found, seen) if seen else None,
        "cold_start": [asdict(point) for point in found.cold_start] if isinstance(found.cold_start, list) else None,
        "differences": differences_content(found.differences, found.followed)
        if isinstance(found.differences, Differences)
        else None,
        "map": _map(found),
        "win_rates": _win_rates(found),
        "answers": _answers(found),
        "unknown": _unknown(found),
    }
    return dict(finite(content))


def in_words(found: Findings) -> str:
    """Return a summary of the findings."""
    said = []
    seen = found.scores.get("seen")
    if seen and found.personalizes:
        gain, own, generic = _gain(seen), _mean(seen, "own"), _mean(seen, "generic")
        if gain.low > 0:
            said.append("The model has learned what its users differ in.")
        elif gain.high < 0:
            said.append("Knowing the user makes the model worse.")
        else:
            said.append("Whether the model has learned what its users differ in cannot be told.")
        said.append(
            f"Knowing the user changes a seen user's pair accuracy by {points(gain)}, from {generic.value:.3f} to "
            f"{own.value:.3f}."
        )
    elif seen:
        said.append(f"{ALIKE[found.reads_text]} Its pair accuracy is {_mean(seen, 'own').value:.3f}.")
    if isinstance(found.win_rates, list):
        said += [
            f"{found.judge[0]} prefers what it writes for a user to the answer of the {rate.against} in "
            f"{rate.rate.value:.0%} of cases ({interval(rate.rate, '.0%')}; ties count half)."
            for rate in found.win_rates
            if rate.against == GENERIC and rate.rate.count
        ]
    return " ".join(said) or found.no_scores or "There are no validation pairs of seen users to judge the model by."


def _mean(scores: Scores, whose: str) -> UserMean:
    return user_mean(scores.user_ids, getattr(scores, whose).double().numpy())


def _gain(scores: Scores) -> UserMean:
    """Return the mean gain in pair accuracy from knowing the user."""
    return user_mean(scores.user_ids, (scores.own - scores.generic).double().numpy())


def _price(found: Findings) -> UserMean | None:
    """Return the baseline's pair accuracy minus the generic user's on the same pairs; None if unknown."""
    seen, baseline = found.scores.get("seen"), found.baseline
    if seen is None or baseline is None or baseline.user_ids != seen.user_ids:
        return None
    return user_mean(seen.user_ids, (baseline.own - seen.generic).double().numpy())


def _drift(seen: Scores) -> dict[str, Any] | None:
    """Return the change by training of the generic user's log-probability per token of chosen answers."""
    if "reference" not in seen.log_probs:
        return None
    change = (seen.log_probs["generic"] - seen.log_probs["reference"]).double().numpy()
    return asdict(user_mean(seen.user_ids, change))


def _unknown(found: Findings) -> dict[str, str]:
    names = ("no_scores", "cold_start", "differences", "map", "win_rates", "answers")
    why = {name: value for name in names if isinstance(value := getattr(found, name), str) and value}
    if not _curves(found.run):
        folder = found.run.folder
        where = f"{folder} has no metrics.csv" if folder else "there is no run folder beside the checkpoint"
        why["learning_curves"] = f"{where}. Name the folder with --run."
    return why


def _curves(run: Run) -> dict[str, Any]:
    logged = {name: run.logged(name) for name in _CURVES}
    return {name: {"steps": steps, "values": values} for name, (steps, values) in logged.items() if steps}


def _accuracy(found: Findings, scores: Scores) -> dict[str, Any]:
    users: list[dict[str, Any]] = [
        {
            "user": found.names.get(user_id),
            "votes": found.votes.get(user_id, 0),
            "pairs": row.pairs,
            "accuracy": row.accuracy,
            "low": row.low,
            "high": row.high,
        }
        for user_id, row in scores.by_user()
    ]
    worst = sorted(users, key=lambda row: row["accuracy"])[: max(1, len(users) // 10)]
    return {
        "own": asdict(_mean(scores, "own")),
        "generic": asdict(_mean(scores, "generic")),
        "worst_tenth": {
            "accuracy": float(np.mean([row["accuracy"] for row in worst])),
            "users": len(worst),
            "pairs": sum(row["pairs"] for row in worst),
        },
        "by_user": users,
    }


def _users_seen(found: Findings) -> list[dict[str, Any]] | None:
    """Return the users of the run's last validation, worst first, if no pairs were scored."""
    if found.scores or not found.run.users:
        return None
    value = "auc" if "auc" in found.run.users[0] else "accuracy"
    known = [row for row in found.run.users if isinstance(row.get(value), float) and row[value] == row[value]]
    return [
        {"user": found.names.get(str(row["user_id"])), **{name: row[name] for name in row if name != "user_id"}}
        for row in sorted(known, key=lambda row: float(row[value]))
    ]


def _writers(found: Findings, seen: Scores) -> dict[str, Any]:
    """Return each writer's pair accuracy, log-probability of chosen answers, utility and well-formedness."""
    answers = found.answers if isinstance(found.answers, Answers) else None
    compared = found.run.comparison.get("vanilla", {})
    rows: dict[str, Any] = {}
    for writer, key in ((OWN, "own"), (GENERIC, "generic"), (BASELINE, "own"), (BEFORE, "reference")):
        scores = found.baseline if writer == BASELINE else seen
        if writer == GENERIC and not found.personalizes:
            continue
        if scores is not None and key in scores.log_probs:
            log_probs = user_mean(scores.user_ids, scores.log_probs[key].double().numpy())
            rows[writer] = {
                "accuracy": None if writer == BEFORE else asdict(_mean(scores, key)),
                "log_prob": log_probs.value,
                "utility": answers.utility[writer].value if answers and writer in answers.utility else None,
                "well_formed": answers.well_formed.get(writer) if answers else None,
            }
        elif writer == BASELINE and compared:
            accuracy = compared.get("val/seen/accuracy_user_mean")
            rows[f"{writer} (comparison.json)"] = {
                "accuracy": None if accuracy is None else {"value": accuracy},
                "log_prob": None,
                "utility": compared.get("utility"),
                "well_formed": compared.get("well_formed"),
            }
    return rows


def _map(found: Findings) -> dict[str, Any] | None:
    if not isinstance(found.map, UserMap):
        return None
    groups, what = found.groups
    return {
        "explained": found.map.explained,
        "generic": found.map.generic.tolist(),
        "groups": what or None,
        "users": [
            {"user": name, "place": place, "group": groups[number] if groups else None}
            for number, (name, place) in enumerate(zip(found.on_map, found.map.points.tolist(), strict=True))
        ],
    }


def _win_rates(found: Findings) -> dict[str, Any] | None:
    if not isinstance(found.win_rates, list):
        return None
    return {"judge": found.judge[0], "caveat": found.judge[1], "against": [asdict(rate) for rate in found.win_rates]}


def _answers(found: Findings) -> dict[str, Any] | None:
    answers = found.answers
    if not isinstance(answers, Answers):
        return None
    numbers = {
        "utility": {writer: asdict(mean) for writer, mean in answers.utility.items()},
        "well_formed": dict(answers.well_formed),
    }
    if not found.show_answers:
        return numbers
    users = [found.names.get(person.user_id) for person in answers.people]
    return {
        **numbers,
        "prompts": answers.prompts,
        "users": users,
        "texts": answers.texts,
        "shown": [{"row": row, "about": found.about.get(answers.people[row].user_id, "")} for row in found.shown],
    }
