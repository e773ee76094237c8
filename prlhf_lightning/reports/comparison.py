"""Comparison of a personalized model with its vanilla counterpart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.policies import Sampling
from prlhf_lightning.simulation.users import SimulatedUser
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.utils.io import atomic_write_bytes
from prlhf_lightning.utils.modes import eval_mode
from prlhf_lightning.utils.terminal import LAYOUT, plain_console, printable

_BATCH = 64


@dataclass(frozen=True)
class Contender:
    """A trained model and the metrics of its last validation.

    Attributes:
        module: The model.
        metrics: Logged values by name, such as `val/seen/accuracy`.
    """

    module: PersonalizedLM
    metrics: Mapping[str, Tensor]


def write(
    module: PersonalizedLM,
    data: PreferenceDataModule,
    requests: Sequence[tuple[SimulatedUser, str]],
    source: SimulatedSource,
    sampling: Sampling | None = None,
) -> list[str]:
    """Return an answer to each request.

    Args:
        module: A trained model.
        data: The data module that it was trained with, for its way of encoding prompts.
        requests: User and prompt of each answer.
        source: Source of the users and their texts.
        sampling: Sampling settings; the model's own by default.
    """
    answers: list[str] = []
    with eval_mode(module):
        for start in range(0, len(requests), _BATCH):
            users, prompts = zip(*requests[start : start + _BATCH], strict=True)
            ids = [data.known_as(user.user_id) for user in users]
            texts = [user.stated_preference() for user in users] if source.user_text else None
            answers += module.generate(data.encode_prompts(prompts).to(module.device), ids, texts, sampling)
    return answers


def judge(contender: Contender, data: PreferenceDataModule, source: SimulatedSource) -> dict[str, float]:
    """Return simulated users' judgments of a model's answers for them.

    Returns:
        Share of well-formed answers, and mean true utility, over seen users and held-out prompts.
    """
    requests = [(user, prompt) for user in source.seen_users for prompt in source.eval_prompts()]
    answers = write(contender.module, data, requests, source)
    verdicts = [
        source.judge(user.user_id, prompt, answer) for (user, prompt), answer in zip(requests, answers, strict=True)
    ]
    return {
        "well_formed": sum(verdict.well_formed for verdict in verdicts) / len(verdicts),
        "utility": sum(verdict.utility for verdict in verdicts) / len(verdicts),
    }


def compare(
    contenders: Mapping[str, Contender], data: PreferenceDataModule, folder: Path | None, quiet: bool = False
) -> None:
    """Print the models' metrics next to each other, and write them to `comparison.json`.

    Simulated users also judge each model's answers for them, and a prompt is answered for the three users whose
    preferences differ most. Reward models write no answers.

    Args:
        contenders: The models by name.
        data: The data module that they were trained with.
        folder: Folder of the file; None to write none.
        quiet: Print and write nothing, for processes other than the first with sharded models.
    """
    rows = {
        "pair accuracy, seen users": "val/seen/accuracy",
        "    mean over users": "val/seen/accuracy_user_mean",
        "    worst tenth of users": "val/seen/accuracy_worst_decile",
        "    same pairs, generic user": "val/seen/generic_accuracy",
        "pair accuracy, unseen users": "val/unseen/accuracy",
        "AUC of thumbs, seen users": "val/seen/auc",
        "    mean over such users": "val/seen/auc_user_mean",
        "    worst tenth of such users": "val/seen/auc_worst_decile",
        "    same thumbs, generic user": "val/seen/generic_auc",
        "AUC of thumbs, unseen users": "val/unseen/auc",
        "well-formed answers": "well_formed",
        "true utility of answers": "utility",
    }
    source = data.source if isinstance(data.source, SimulatedSource) else None
    write_answers = all(contender.module.policy.writes for contender in contenders.values())
    results: dict[str, dict[str, float]] = {}
    for name, contender in contenders.items():
        values = {key: float(value) for key, value in contender.metrics.items()}
        # Without personalization all users are the generic user.
        for key in ("accuracy", "auc"):
            if f"val/seen/{key}" in values:
                values.setdefault(f"val/seen/generic_{key}", values[f"val/seen/{key}"])
        results[name] = values | (judge(contender, data, source) if source and write_answers else {})
    table = Table(title="Validation", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if source:
        table.add_column("best possible", justify="right")
    limits = _limits(source) if source else {}
    for label, key in rows.items():
        if any(key in values for values in results.values()):
            cells = [f"{values[key]:.3f}" if key in values else "" for values in results.values()]
            table.add_row(label, *cells, *([f"{limits[key]:.3f}" if key in limits else ""] if source else []))
    console = plain_console(quiet=quiet)
    console.print(table if table.row_count else "Nothing was validated on, so there is nothing to compare.")
    if source and write_answers:
        _show_answers(console, contenders, data, source)
    if folder and not quiet:
        content = {**results, **({"best possible": limits} if source else {})}
        atomic_write_bytes(folder / "comparison.json", json.dumps(content, indent=2).encode() + b"\n")


def _limits(source: SimulatedSource) -> dict[str, float]:
    """Return the accuracy of a model that knows every user's preferences; labels are noisy, so below 1."""
    limits = {"val/seen/accuracy": source.noise_ceiling(), "well_formed": 1.0, "utility": 1.0}
    if source.unseen_users:
        limits["val/unseen/accuracy"] = source.noise_ceiling(unseen=True)
    return limits


def _show_answers(
    console: Console, contenders: Mapping[str, Contender], data: PreferenceDataModule, source: SimulatedSource
) -> None:
    prompt = source.eval_prompts()[0]
    users = source.contrasting_users(3)
    console.print(Text(f"\n{printable(prompt, LAYOUT)}", style="bold"))
    greedy = Sampling(max_new_tokens=64, temperature=0.0)
    answers = {
        name: write(contender.module, data, [(user, prompt) for user in users], source, greedy)
        for name, contender in contenders.items()
    }
    for i, user in enumerate(users):
        console.print(f"\n{printable(user.user_id)} (hidden taste: {user.stated_preference()})")
        for name, texts in answers.items():
            utility = source.judge(user.user_id, prompt, texts[i]).utility
            parts = ((f"  {name}", "cyan"), (f" (utility {utility:+.2f}) ", "dim"), printable(texts[i], LAYOUT))
            console.print(Text.assemble(*parts))
