"""What a report found, as numbers for a program: the JSON file beside the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prlhf_lightning.analysis.win_rate import UserMean, user_mean
from prlhf_lightning.reports.answers import Answers
from prlhf_lightning.reports.differences import Differences
from prlhf_lightning.reports.page import Findings, gain_of, in_words, price_of
from prlhf_lightning.reports.pairs import Scores
from prlhf_lightning.reports.user_map import UserMap

FORMAT = 1


def json_path(page: Path) -> Path:
    """Return where the numbers of a page go: beside it, under its name."""
    return page.with_suffix(".json") if page.suffix != ".json" else page.with_name(f"{page.name}.json")


def to_json(found: Findings) -> bytes:
    """Return what was found, with users called as on the page; what is not known is null, and `unknown` says why."""
    content = {
        "format": FORMAT,
        "title": found.title,
        "model": found.model,
        "in_short": in_words(found),
        "pair_accuracy": {name: _accuracy(found, scores) for name, scores in found.scores.items()},
        "gain": _mean(gain_of(found.scores["seen"])) if "seen" in found.scores and found.personalizes else None,
        "price": _mean(price) if (price := price_of(found)) else None,
        "baseline": _mean(_own(found.baseline)) if found.baseline else None,
        "comparison": found.run.comparison or None,
        "cold_start": [asdict(point) for point in found.cold_start] if isinstance(found.cold_start, list) else None,
        "differences": _differences(found),
        "map": _map(found),
        "win_rates": _win_rates(found),
        "answers": _answers(found),
        "unknown": {
            name: value
            for name in ("no_scores", "cold_start", "differences", "map", "win_rates", "answers")
            if isinstance(value := getattr(found, name), str) and value
        },
    }
    return json.dumps(_finite(content), ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n"


def _accuracy(found: Findings, scores: Scores) -> dict[str, Any]:
    users = [
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
    generic = user_mean(scores.user_ids, scores.generic.double().numpy())
    return {"own": _mean(_own(scores)), "generic": _mean(generic), "by_user": users}


def _own(scores: Scores) -> UserMean:
    return user_mean(scores.user_ids, scores.own.double().numpy())


def _mean(mean: UserMean) -> dict[str, Any]:
    return asdict(mean)


def _differences(found: Findings) -> list[dict[str, Any]] | None:
    if not isinstance(found.differences, Differences):
        return None
    tastes = found.differences.tastes
    return [
        {
            "feature": name,
            "mean": float(tastes.mean[place]),
            "spread": float(tastes.spread[place]),
            "low": float(tastes.low[place]),
            "high": float(tastes.high[place]),
            "followed": dict(zip(("correlation", "low", "high"), found.followed[name], strict=True))
            if name in found.followed
            else None,
        }
        for place, name in enumerate(found.differences.features)
    ]


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
        "utility": {writer: _mean(mean) for writer, mean in answers.utility.items()},
        "well_formed": dict(answers.well_formed),
    }
    if not found.show_answers:
        return numbers
    users = [found.names.get(person.user_id) for person in answers.people]
    return {**numbers, "prompts": answers.prompts, "users": users, "texts": answers.texts}


def _finite(value: Any) -> Any:
    """Return a value in which numbers that are none, which JSON does not have, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
