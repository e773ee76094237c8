"""The command `report`: a page about a trained model, and its numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from rich.progress import Progress

from prlhf_lightning.analysis.feedback_table import read_table
from prlhf_lightning.analysis.judges import Judge, RewardJudge, UtilityJudge
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import load_module, module_of, pick_device, reward_model_of
from prlhf_lightning.data import DataSource, PreferenceDataModule, SimulatedSource
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.reports.answers import (
    OWN,
    AnswerGenerator,
    Answers,
    features_written,
    find_people,
    find_prompts,
    win_rates,
    with_utility,
)
from prlhf_lightning.reports.differences import Differences, correlations, find_differences, votes_of
from prlhf_lightning.reports.findings import Findings, report_content
from prlhf_lightning.reports.html import Page
from prlhf_lightning.reports.json_file import json_path, to_json
from prlhf_lightning.reports.page import page_of
from prlhf_lightning.reports.pairs import Scores, cold_start_of, score
from prlhf_lightning.reports.reward_model import page_of_rewards, reward_content
from prlhf_lightning.reports.run import data_of, open_run, reward_data_of
from prlhf_lightning.reports.user_map import UserMap, map_users, most_unlike
from prlhf_lightning.training.checkpoint_entry import is_reward_model
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.utils.io import check_output, write_together
from prlhf_lightning.utils.progress import progress_bars
from prlhf_lightning.utils.terminal import LAYOUT, printable

_ON_THE_MAP = 2000
_SHOWN_USERS = 3


def report(
    model: Path,
    output: Path = Path("report.html"),
    run: Path | None = None,
    source: DataSource | None = None,
    judge: Judge | None = None,
    baseline: Path | None = None,
    title: str | None = None,
    num_users: int = 20,
    num_prompts: int = 8,
    max_pairs: int = 5000,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    show_answers: bool = True,
    show_user_text: bool = False,
    show_user_ids: bool = False,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Write a page about a trained model, and its numbers as JSON next to it.

    Learning curves; each user's accuracy against the votes given; how new users fare; what users differ in; a map of
    users; what personalization costs; what the model writes for users, and how often a judge prefers that. For a reward
    model: accuracies, calibration, the effect of length, and new users. See docs/report.md.

    Args:
        model: A checkpoint of `fit`, or the folder of its run.
        output: The page to write, one HTML file that needs no other. Its numbers go beside it, as `report.json`.
        run: The folder of the run, for its `config.yaml` and `metrics.csv`; where the checkpoint lies if not given.
        source: Other data than the run's configuration names, as for `fit --data.source`.
        judge: Who compares answers: UtilityJudge, RewardJudge, OpenAIJudge or a class of your own. Simulated users
            judge for themselves if none is given; others are not asked.
        baseline: A model of the same without users, to compare with: a checkpoint, or the folder of its run. By default
            the one that `fit --train_baseline true` keeps in the run's folder, if it did.
        title: Title of the page.
        num_users: Users whose answers are written and judged, spread evenly over those with validation pairs.
        num_prompts: Prompts that each of them is answered.
        max_pairs: Most validation pairs scored of the seen, and of the unseen users.
        batch_size: Pairs in a pass of the model.
        max_new_tokens: Tokens of an answer at most; as the model was told to write if not given.
        show_answers: Whether prompts and answers stand on the page.
        show_user_text: Whether the users' texts do.
        show_user_ids: Whether users are called by their ids, and not by numbers.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        seed: Draws answers, where they are sampled, and bootstrap samples.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    least = {"num_users": num_users, "num_prompts": num_prompts, "max_pairs": max_pairs, "batch_size": batch_size}
    for name, value in least.items():
        if value < 1:
            raise ConfigurationError(f"{name} is {value}; it must be 1 or more.")
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed is {seed}; it must be at least 0 and below 2**32.")
    check_output(output, "output")
    check_output(json_path(output), "output")
    checkpoint = checkpoint_of(model)
    seed_everything(seed, verbose=False)
    left = open_run(checkpoint, run)
    named = f"{left.folder.name}/{checkpoint.name}" if left.folder else checkpoint.name
    read = read_checkpoint(checkpoint, "model")
    if read and is_reward_model(read):
        if judge is not None or baseline is not None or max_new_tokens is not None:
            raise ConfigurationError(
                "judge, baseline, max_new_tokens: a reward model writes nothing that could be judged, and is compared "
                "with its generic user; leave them out."
            )
        rewards = reward_model_of(read, checkpoint, "model", trust_classes).eval().to(pick_device(device))
        judged = reward_data_of(left, source, rewards, trust_classes)
        content = reward_content(rewards, judged, left, title or f"Reward model: {named}", max_pairs, show_user_ids)
        _write(output, page_of_rewards(content), content)
        return
    module = module_of(read, checkpoint, "model", trust_remote_code, trust_classes).eval().to(pick_device(device))
    whose = data_of(left, source, module, trust_classes)
    if baseline is None and left.folder and (kept := left.folder / "baseline" / "last.ckpt").is_file():
        baseline = kept  # of `fit --train_baseline true`
    without = None
    if baseline is not None:
        without = load_module(checkpoint_of(baseline, "baseline"), "baseline", trust_remote_code, trust_classes)
        without = without.eval().to(module.device)
    found = Findings(
        title or f"Model: {named}",
        _described(module),
        left,
        module.user_model.personalizes,
        module.user_model.uses_text,
        show_answers=show_answers,
    )
    if whose is None:
        found.no_scores = found.cold_start = found.differences = found.answers = found.win_rates = (
            "The data are not known: there is no config.yaml beside the checkpoint. Name the run's folder with --run, "
            "or the data with --source."
        )
    elif module.loss.feedback != "pairs":
        found.no_scores = found.cold_start = found.differences = (
            f"{type(module.loss).__name__} learns from {module.loss.feedback}; only losses over pairs rank pairs."
        )
    if whose is not None:
        # Now, as reading and tokenizing have progress bars of their own.
        found.votes = whose.votes_by_user()
        if module.loss.feedback == "pairs":
            found.differences = _differences(whose, seed)
    with progress_bars() as progress:
        if whose is not None:
            if module.loss.feedback == "pairs":
                _score_pairs(found, module, without, whose, max_pairs, batch_size, progress)
            sampling = replace(
                module.sampling, **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
            )
            scribe = AnswerGenerator(module, whose, sampling, without)
            _write_answers(found, module, whose, scribe, (num_users, num_prompts), judge, seed, progress)
            if isinstance(judge, RewardJudge) and judge.model.resolve() == checkpoint.resolve():
                found.judge = (found.judge[0], "The judge is the very model that is judged: it likes what it writes.")
            if isinstance(found.differences, Differences) and isinstance(found.answers, Answers):
                found.followed = correlations(found.differences, features_written(found.answers))
        _map(found, module, whose)
    _call_users(found, module, whose, show_user_ids, show_user_text)
    content = report_content(found)
    _write(output, page_of(content), content)


def _write(output: Path, page: Page, content: Mapping[str, Any]) -> None:
    write_together({output: page.render().encode(), json_path(output): to_json(content)})
    print(printable(content["in_short"], LAYOUT))
    print(f"The page: {output}")
    print(f"The same as numbers: {json_path(output)}")


def _score_pairs(
    found: Findings,
    module: PersonalizedModel,
    without: PersonalizedModel | None,
    data: PreferenceDataModule,
    most: int,
    batch_size: int,
    progress: Progress,
) -> None:
    def scored(model: PersonalizedModel, pairs: Pairs, what: str) -> Scores:
        places = spread(len(pairs), most)
        task = progress.add_task(what, total=len(places))
        return score(model, pairs, places, batch_size, lambda count: progress.advance(task, count))

    for name in ("seen", "unseen"):
        if (pairs := data.evaluation_pairs(name)) is not None:
            found.scores[name] = scored(module, pairs, f"Scoring pairs of {name} users")
            if name == "seen" and without is not None:
                found.baseline = scored(without, pairs, "Scoring them under the baseline")
    task = progress.add_task("Learning new users", total=None)
    found.cold_start = cold_start_of(module, data.evaluation_pairs("unseen"))
    progress.update(task, total=1, completed=1)


def _write_answers(
    found: Findings,
    module: PersonalizedModel,
    data: PreferenceDataModule,
    scribe: AnswerGenerator,
    counts: tuple[int, int],
    judge: Judge | None,
    seed: int,
    progress: Progress,
) -> None:
    if not module.policy.writes:
        found.answers = found.win_rates = "A reward model writes no answers."
        return
    if judge is None and isinstance(data.source, SimulatedSource):
        judge = UtilityJudge()
    if judge is not None:
        judge.prepare(data)  # before anything is written, as it may not be able to judge
    pairs, known = data.evaluation_pairs("seen"), module.vocabulary
    if pairs is None or known is None:
        found.answers = found.win_rates = "There are no validation rows of seen users, whose prompts could be answered."
        return
    codes = np.unique(pairs.split.users[pairs.positions])
    user_ids = [user_id for code in codes if (user_id := pairs.split.user_ids[code]) in known]
    some = [user_ids[place] for place in spread(len(user_ids), counts[0])]
    if not some:
        found.answers = found.win_rates = "The checkpoint knows none of the users of these data."
        return
    people, texts = find_people(data, pairs, some)
    asked = find_prompts(data, pairs, counts[1])
    if not asked:
        found.answers = found.win_rates = "The validation prompts have tools, or do not stand in the data any more."
        return
    task = progress.add_task("Writing answers", total=len(scribe.writers) * len(people) * len(asked))
    written = scribe.write(people, texts, asked, lambda count: progress.advance(task, count))
    answers = Answers(asked, people, written, {}, {})
    if isinstance(data.source, SimulatedSource):
        truth = judge if isinstance(judge, UtilityJudge) else UtilityJudge()
        truth.prepare(data)
        answers = with_utility(answers, truth, seed)
    found.answers = answers
    rows = known.rows([person.user_id for person in people])
    # On the map, as in all directions alike users differ by chance as well.
    mapped = map_users(module, rows)
    found.shown = most_unlike(mapped.points, _SHOWN_USERS) if mapped else list(range(min(_SHOWN_USERS, len(people))))
    others = [writer for writer in written if writer != OWN]
    if judge is None or not others:
        found.win_rates = (
            "No judge was named; see --judge in docs/report.md." if others else "There is nobody to compare with."
        )
        return
    task = progress.add_task("Judging", total=len(others) * len(people) * len(asked))
    found.win_rates = win_rates(answers, judge, seed, lambda: progress.advance(task))
    found.judge = (judge.name, judge.caveat)


def _differences(data: PreferenceDataModule, seed: int) -> Differences | str:
    table = read_table(data.source, ["train"])
    differences = find_differences(table, votes_of(table, "train"), seed)
    if isinstance(differences, str):
        return differences
    return replace(differences, user_ids=tuple(map(data.known_as, differences.user_ids)))


def _map(found: Findings, module: PersonalizedModel, data: PreferenceDataModule | None) -> None:
    known = module.vocabulary
    size = len(known) - 1 if known else 0
    mapped = map_users(module, torch.from_numpy(spread(size, _ON_THE_MAP)) + 1) if size else None
    if known is None or mapped is None:
        found.map = (
            "there are fewer than three users, or all have the same vectors."
            if module.user_model.row_tables()
            else f"{type(module.user_model).__name__} has no vectors of users."
        )
        return
    found.map = mapped
    if mapped.clusters is not None:
        groups = [f"cluster {number + 1}" for number in mapped.clusters.tolist()]
        found.groups = (groups, "the shared prompt that a user has most of")
    elif data is not None and isinstance(data.source, SimulatedSource):
        group_of = {data.known_as(user.user_id): f"group {user.group + 1}" for user in data.source.seen_users}
        groups = [group_of.get(known.ids[row - 1], "other") for row in mapped.rows.tolist()]
        found.groups = (groups, "the simulated users' true groups of taste, which the model was not told")
    elif isinstance(found.differences, Differences) and found.differences.is_told:
        group_of = dict(zip(found.differences.user_ids, found.differences.groups(), strict=True))
        groups = [group_of.get(known.ids[row - 1], "not known") for row in mapped.rows.tolist()]
        what = f"how much a user likes answers with {found.differences.features[0]}, by their votes"
        found.groups = (groups, what)


def _call_users(
    found: Findings, module: PersonalizedModel, data: PreferenceDataModule | None, ids: bool, texts: bool
) -> None:
    """Set the displayed names and descriptions of users."""
    known = module.vocabulary.ids if module.vocabulary else ()
    found.names = {user_id: user_id if ids else f"user {number}" for number, user_id in enumerate(known, start=1)}
    if isinstance(found.map, UserMap):
        found.on_map = [found.names[known[row - 1]] for row in found.map.rows.tolist()]
    if texts and isinstance(found.answers, Answers):
        found.about = {person.user_id: person.text for person in found.answers.people}
    if data is not None and isinstance(data.source, SimulatedSource):  # nobody's secret
        found.about = {
            data.known_as(user.user_id): f"hidden taste: {user.stated_preference()}" for user in data.source.seen_users
        }


def _described(module: PersonalizedModel) -> str:
    policy = getattr(module.policy, "name", type(module.policy).__name__)
    users = len(module.vocabulary) - 1 if module.vocabulary else 0
    return (
        f"{type(module.user_model).__name__} of {users:,} users, {type(module.loss).__name__}, policy "
        f"{str(policy).rpartition('/')[2]}."
    )
