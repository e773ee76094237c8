"""The report on a reward model: its numbers, as JSON values, and the page made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from prlhf_lightning.adaptation import ColdStartPoint, cold_start_heads
from prlhf_lightning.analysis.votes import Floats
from prlhf_lightning.analysis.win_rate import user_mean
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.metrics import wilson_interval
from prlhf_lightning.metrics.preference import pair_scores
from prlhf_lightning.reports import plots
from prlhf_lightning.reports.findings import Findings, report_content
from prlhf_lightning.reports.html import Cell, Page, Section
from prlhf_lightning.reports.json_file import finite
from prlhf_lightning.reports.page import add_facts, add_new_users, add_users
from prlhf_lightning.reports.pairs import Scores, new_users_places
from prlhf_lightning.reports.run import Run
from prlhf_lightning.reports.words import interval, mean_of, points
from prlhf_lightning.rewards import JudgedPairs
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule

_BINS = 10
_DRAWS = 200
#: Entries that are as in the report on a policy.
_SHARED = (
    "format",
    "title",
    "model",
    "personalizes",
    "reads_text",
    "in_short",
    "votes",
    "pair_accuracy",
    "users_seen",
    "gain",
    "cold_start",
)
_WHOSE = {"choices": "the users' choices", "own": "rewards for the users", "generic": "rewards for the generic user"}


@dataclass(frozen=True)
class Judgments:
    """N held-out pairs, as a reward model judges them.

    Attributes:
        user_ids: The user of each pair.
        own: `[N]` reward of the chosen completion minus that of the rejected one, for the pair's user.
        generic: `[N]` the same for the generic user.
        longer: `[N]` tokens of the chosen completion minus those of the rejected one.
    """

    user_ids: tuple[str, ...]
    own: Floats
    generic: Floats
    longer: Floats


def judge(model: PersonalizedRewardModel, pairs: JudgedPairs) -> Judgments:
    """Return the margins of pairs, and their differences in length."""
    features, rows = model.features_of(pairs.texts), model.rows_of(pairs.user_ids)
    sides = [side.to(rows.device) for side in (pairs.chosen, pairs.rejected)]
    own, generic = (
        np.subtract(*(model.rewards(features, rows, side, is_generic).double().cpu().numpy() for side in sides))
        for is_generic in (False, model.user_model.personalizes)
    )
    lengths = np.array([len(ids) for ids in pairs.texts.completions], dtype=np.float64)
    return Judgments(pairs.user_ids, own, generic, lengths[pairs.chosen.numpy()] - lengths[pairs.rejected.numpy()])


def calibration(margins: Floats, seed: int = 0) -> dict[str, Any]:
    """Return how well probabilities agree with choices.

    The text with the higher reward has the probability `p = σ(|margin|)`. In bins of p, of equal width between 0.5 and
    1, its mean is compared with the share of pairs in which users chose that text. The mean absolute difference,
    weighted by pairs, is the expected calibration error (ECE; Guo et al. 2017, arXiv:1706.04599, Eq. 3). It is above 0
    for calibrated probabilities too, as shares are noisy: `chance` has its mean and its 95% quantile if users chose by
    these very probabilities, each pair for itself.

    Args:
        margins: `[N]` rewards of chosen completions minus those of rejected ones.
        seed: Of the simulated choices.
    """
    sure, right = 1 / (1 + np.exp(-np.abs(margins))), (np.sign(margins) + 1) / 2
    bins = np.minimum((2 * _BINS * (sure - 0.5)).astype(int), _BINS - 1)
    draws = np.random.default_rng(seed).random((_DRAWS, len(sure))) < sure
    chance = [_ece(bins, sure, draw.astype(np.float64)) for draw in draws]
    rows = []
    for number in np.unique(bins):
        inside = bins == number
        share, count = float(right[inside].mean()), int(inside.sum())
        low, high = wilson_interval(share, count)
        rows.append(
            {"pairs": count, "confidence": float(sure[inside].mean()), "accuracy": share, "low": low, "high": high}
        )
    return {
        "pairs": len(margins),
        "ece": _ece(bins, sure, right),
        "chance": {"mean": float(np.mean(chance)), "high": float(np.quantile(chance, 0.95))},
        "confidence": float(sure.mean()),
        "accuracy": float(right.mean()),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "bins": rows,
    }


def _ece(bins: Any, sure: Floats, right: Floats) -> float:
    return float(np.abs(np.bincount(bins, weights=right - sure)).sum() / len(bins))


def length_bias(judged: Judgments, is_likelihood: bool) -> dict[str, Any]:
    """Return how rewards go with length, beside how the users' choices do; means over users.

    Args:
        judged: N pairs of two texts each.
        is_likelihood: Whether margins are log-odds.

    Returns:
        `longer_wins`, the share of the pairs of different lengths in which the longer text is preferred;
        `correlation` of a pair's margin and its difference in length, over both orders of all pairs of a user (for
        choices, with a margin of 1); and `excess`, by how much the expected share of longer texts, by the probabilities
        for the users, exceeds the share that they chose. A ranking shows a preference in every pair, and choices only
        in more pairs than not. So `longer_wins` of a good model may well exceed that of the choices, but not `excess`.
    """
    users, differs = np.asarray(judged.user_ids), judged.longer != 0
    whose = {"choices": np.ones_like(judged.own), "own": judged.own, "generic": judged.generic}
    some, way = users[differs].tolist(), np.sign(judged.longer[differs])
    wins = {name: (np.sign(margins[differs] * way) + 1) / 2 for name, margins in whose.items()}
    expected = 1 / (1 + np.exp(-judged.own[differs] * way))
    names, codes = np.unique(users, return_inverse=True)

    def correlations(margins: Floats) -> Floats:
        products = (margins * judged.longer, margins**2, judged.longer**2)
        both, one, other = (np.bincount(codes, weights=product) for product in products)
        size = np.sqrt(one * other)
        found: Floats = np.divide(both, size, out=np.full_like(both, np.nan), where=size > 0)
        return found

    return {
        "pairs": int(differs.sum()),
        "longer_wins": {name: asdict(user_mean(some, values)) for name, values in wins.items()},
        "correlation": {
            name: asdict(user_mean(names.tolist(), correlations(margins))) for name, margins in whose.items()
        },
        "excess": asdict(user_mean(some, expected - wins["choices"])) if is_likelihood else None,
    }


def reward_content(
    model: PersonalizedRewardModel, data: RewardDataModule | None, run: Run, title: str, most: int, show_ids: bool
) -> dict[str, Any]:
    """Return the findings about a reward model as JSON values; see `report_content`.

    Args:
        model: A trained model.
        data: Data with validation pairs; None if they are not known.
        run: What the run left.
        title: Of the page.
        most: Most pairs to judge of the seen, and of the unseen users.
        show_ids: Whether users are called by their ids, and not by numbers.
    """
    known = model.vocabulary.ids if model.vocabulary else ()
    found = Findings(title, _described(model), run, model.user_model.personalizes)
    found.names = {user_id: user_id if show_ids else f"user {number}" for number, user_id in enumerate(known, start=1)}
    judged: dict[str, Judgments] = {}
    if data is None:
        found.no_scores = found.cold_start = (
            "The data are not known: there is no config.yaml beside the checkpoint. Name the run's folder with --run, "
            "or the data with --source."
        )
    else:
        found.votes = data.votes_by_user()
        for name in ("seen", "unseen"):
            if (pairs := data.evaluation_pairs(name)) is not None:
                judged[name] = judge(model, data.judged(_part(pairs, spread(len(pairs), most))))
                found.scores[name] = _scores(judged[name])
        found.cold_start = _new_users(model, data)
    content = report_content(found)
    unknown = {name: why for name, why in content["unknown"].items() if name in ("no_scores", "cold_start")}
    if not model.has_likelihood:
        unknown["calibration"] = f"{type(model.loss).__name__} is no likelihood, so its rewards give no probabilities."
    if data is not None and data.feedback == "thumbs":
        unknown["length"] = "A thumb has one text, and a threshold has no length."
    findings: dict[str, Any] = {
        "calibration": {name: _calibrations(one, name, found.personalizes) for name, one in judged.items()},
        "length": {name: length_bias(one, model.has_likelihood) for name, one in judged.items()},
    }
    return {
        **{name: content[name] for name in _SHARED},
        **{name: None if name in unknown else finite(value) for name, value in findings.items()},
        "unknown": unknown,
    }


def _part(pairs: Pairs, places: Any) -> Pairs:
    return Pairs(pairs.split, pairs.positions[places])


def _scores(judged: Judgments) -> Scores:
    own, generic = (torch.from_numpy(margins) for margins in (judged.own, judged.generic))
    nothing = torch.zeros_like(own)
    return Scores(judged.user_ids, pair_scores(own, nothing), pair_scores(generic, nothing), {})


def _calibrations(judged: Judgments, name: str, personalizes: bool) -> dict[str, Any]:
    own = {"own": calibration(judged.own)}
    # For unseen users, the rewards are those of the generic user anyway.
    return own | {"generic": calibration(judged.generic)} if personalizes and name == "seen" else own


def _new_users(model: PersonalizedRewardModel, data: RewardDataModule) -> list[ColdStartPoint] | str:
    if data.feedback == "thumbs":
        return "New users of a reward model are learned from pairs, and these data are thumbs."
    pairs = data.evaluation_pairs("unseen")
    places = new_users_places(pairs)
    if pairs is None or isinstance(places, str):
        return str(places)
    try:
        learned, tested = (data.judged(_part(pairs, part)) for part in places)
        return cold_start_heads(model, learned, tested)
    except ConfigurationError as error:  # it has no codes
        return str(error)


def _described(model: PersonalizedRewardModel) -> str:
    users = len(model.vocabulary) - 1 if model.vocabulary else 0
    backbone = model.backbone.name.rpartition("/")[2].removeprefix("builtin:")
    return f"{type(model.user_model).__name__} of {users:,} users, {type(model.loss).__name__}, backbone {backbone}."


def page_of_rewards(content: Mapping[str, Any]) -> Page:
    """Return the page of a report on a reward model.

    Args:
        content: See `reward_content`, or what `json.load` returns of a `report.json`.
    """
    page = Page(
        content["title"],
        content["model"],
        footer="Written by prlhf_lightning report. Intervals are of 95%; those over users are bootstraps.",
    )
    section = page.section("In short")
    section.text(content["in_short"], "verdict")
    add_facts(section, content)
    add_users(page.section("Users"), content)
    _calibration(page.section("Calibration"), content)
    _length(page.section("Length"), content)
    add_new_users(page.section("New users"), content)
    return page


def _missing(content: Mapping[str, Any], name: str) -> str:
    unknown = content["unknown"]
    return f"Not known: {unknown.get(name) or unknown.get('no_scores') or 'There are no validation pairs.'}"


def _calibration(section: Section, content: Mapping[str, Any]) -> None:
    found = content["calibration"]
    if not found:
        section.text(_missing(content, "calibration"))
        return
    first = "seen" if "seen" in found else "unseen"
    section.text(_in_words(found[first]["own"]))
    plots.reliability(section, found[first]["own"]["bins"], f"{first} users")
    rows: list[list[Cell]] = []
    for name, parts in found.items():
        for whose, one in parts.items():
            label = f"{name} users" if whose == "own" else "same pairs, generic user"
            numbers = (one[part] for part in ("ece", "confidence", "accuracy", "log_loss"))
            rows.append([label, one["pairs"], *numbers, one["chance"]["mean"], one["chance"]["high"]])
    section.table(
        ["pairs of", "pairs", "ECE", "expected", "accuracy", "log-loss", "chance", "chance, 95%"],
        rows,
        "ECE: mean distance between probabilities and shares, over ten bins; expected: mean probability of the "
        "preferred text; chance: ECE of calibrated probabilities with so many pairs, its mean and 95% quantile",
    )


def _in_words(one: Mapping[str, Any]) -> str:
    ece, chance = one["ece"], one["chance"]["high"]
    if ece <= chance:
        return (
            f"Calibrated as far as {one['pairs']:,} pairs can show: the calibration error is {ece:.3f}, and chance "
            f"alone gives up to {chance:.3f}."
        )
    kind = "too sure" if one["confidence"] > one["accuracy"] else "not sure enough"
    return (
        f"The rewards are {kind}: they expect to be right in {one['confidence']:.1%} of pairs, and are in "
        f"{one['accuracy']:.1%}. The calibration error is {ece:.3f}, where chance alone gives up to {chance:.3f}."
    )


def _length(section: Section, content: Mapping[str, Any]) -> None:
    found = content["length"]
    if not found:
        section.text(_missing(content, "length"))
        return
    for name, one in found.items():
        if not one["pairs"]:
            section.text(f"The two texts of each pair of {name} users have the same length.")
            continue
        if one["excess"]:
            excess = mean_of(one["excess"])
            if excess.low > 0:
                verdict = "Rewards favor longer texts more than the users do"
            elif excess.high < 0:
                verdict = "Rewards favor longer texts less than the users do"
            else:
                verdict = "Rewards favor length no more and no less than the users do, as far as these pairs can show"
            section.text(f"{name.capitalize()} users: {verdict}: {points(excess)}.")
        rows: list[list[Cell]] = []
        for whose, label in _WHOSE.items():
            if whose == "generic" and (name == "unseen" or not content["personalizes"]):
                continue
            wins, linked = mean_of(one["longer_wins"][whose]), mean_of(one["correlation"][whose])
            rows.append([label, wins.value, interval(wins, ".3f"), linked.value, interval(linked, ".3f")])
        section.table(
            ["preferred by", "longer wins", "95% interval", "correlation", "interval of it"],
            rows,
            f"{one['pairs']:,} pairs of {name} users with different lengths, in tokens; means over users",
        )
    section.text(
        "The points are the expected share of longer texts, by the probabilities of the rewards, minus the share that "
        "users chose. A ranking prefers the longer text in every pair where it is a little better, so its own share "
        "may be higher. The correlation is that of the difference in reward with the difference in length.",
        "note",
    )
