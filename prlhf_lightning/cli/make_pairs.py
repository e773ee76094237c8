"""The command `make-pairs`: preference pairs made of a policy's own answers, for iterative training."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning.analysis.judges import Judge
from prlhf_lightning.analysis.judges.ranking import JudgeScorer
from prlhf_lightning.cli.candidates import described, finite, report_unknown
from prlhf_lightning.cli.models import load_module, open_writer, pick_device, writer_of
from prlhf_lightning.cli.prompt_rows import PromptRow, distinct, people_of, rows_of_file, rows_of_training
from prlhf_lightning.data import DataSource, FileSource, PreferenceDataModule
from prlhf_lightning.data.privacy import hashed
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.inference.best_of import Candidates, Scores, check_sampled, hashed_seed, sample_candidates
from prlhf_lightning.inference.sampled_pairs import pair_of
from prlhf_lightning.reports.run import data_of, open_run
from prlhf_lightning.training.checkpoint_files import checkpoint_of, origin
from prlhf_lightning.training.reward_scorer import load_scorer
from prlhf_lightning.utils.hashing import SETTINGS
from prlhf_lightning.utils.io import atomic_writer, check_output
from prlhf_lightning.utils.journal import Journal
from prlhf_lightning.utils.progress import tracked
from prlhf_lightning.utils.terminal import plain_console


def make_pairs(
    model: Path,
    output: Path,
    reward_model: Path | None = None,
    judge: Judge | None = None,
    prompts: Path | None = None,
    columns: dict[str, str] | None = None,
    source: DataSource | None = None,
    run: Path | None = None,
    num_answers: int = 8,
    prompts_per_user: int | None = None,
    min_margin: float = 0.0,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    strength: float = 1.0,
    seed: int = 0,
    max_batch_rows: int = 64,
    device: str = "auto",
    hash_user_ids_with: str | None = None,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Sample answers for users, and write the best against the worst as pairs that `fit` takes.

    For iterative training; see docs/iterative.md. A stopped command continues where it was if it is repeated.

    Args:
        model: The policy that writes: a checkpoint of `fit`, or the folder of its run. With `--prompts` also a folder
            that `export` wrote.
        output: The JSONL file to write, with `user_id`, `prompt`, `chosen`, `rejected` and `margin`, the difference of
            the two rewards. It is written atomically at the end; until then, `OUTPUT.progress` keeps what is done.
        reward_model: Who scores answers: a checkpoint of a reward model, or of a policy (whose implicit reward is
            used), or the folder of its run.
        judge: Who compares answers in place of a reward model: UtilityJudge (for simulated users), OpenAIJudge or a
            class of your own. An answer's score is then the share of the other answers that it beats.
        prompts: Rows of `user_id` and `prompt`, in any format that training reads. By default, users and prompts of the
            model's training rows.
        columns: Mapping of fields to column names of `prompts`, as in `{user_id: worker}`.
        source: Other data than the run's, whose training rows give users and prompts, as for `fit --data.source`.
        run: The folder of the model's run, for its `config.yaml`; where the checkpoint lies if not given.
        num_answers: Number of answers sampled for each user and prompt.
        prompts_per_user: Maximum number of prompts of each user, drawn at random.
        min_margin: Pairs whose rewards differ by this much or less are left out as ties.
        max_new_tokens: Maximum number of new tokens. Answers that it cuts off are never chosen.
        temperature: Sampling temperature.
        top_p: Probability mass to sample from.
        strength: How strongly users change the answers, as for `generate`.
        seed: Random seed. Answers depend on it, the user and the prompt, and not on other rows.
        max_batch_rows: Maximum number of rows in a step of the policy.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training, for the ids of `prompts`; the pairs then
            have pseudonyms.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    if (reward_model is None) == (judge is None):
        raise ConfigurationError("reward_model: who says which answer is best? Give one of --reward_model and --judge.")
    if prompts is not None and source is not None:
        raise ConfigurationError("prompts: give users and prompts by one of --prompts and --source.")
    if num_answers < 2:
        raise ConfigurationError(f"num_answers is {num_answers}; a pair needs 2 or more.")
    if prompts_per_user is not None and prompts_per_user < 1:
        raise ConfigurationError(f"prompts_per_user is {prompts_per_user}; it must be 1 or more.")
    if not min_margin >= 0:
        raise ConfigurationError(f"min_margin is {min_margin}; it must be 0 or more.")
    if output.suffix != ".jsonl":
        raise ConfigurationError(f"output: {output} does not end in .jsonl, by which `fit` knows the format.")
    check_sampled(num_answers, temperature)
    request = GenerationRequest("", None, "", strength, max_new_tokens, temperature, top_p, seed)  # checks the settings
    unfinished = output.with_name(f"{output.name}.progress")
    for path in (output, unfinished):
        check_output(path, "output")
    device = pick_device(device)

    writer, data, path = _open(model, run, source, device, trust_remote_code, trust_classes)
    if prompts is not None:
        found = rows_of_file(hashed(FileSource(prompts, columns=columns), hash_user_ids_with))
    elif data is not None:
        found = rows_of_training(data)
    else:
        raise ConfigurationError(
            "prompts: the data of the model's run are not known. Give users and prompts with --prompts or --source, or "
            "the run's folder with --run."
        )
    counts: Counter[str] = Counter()
    rows = distinct(found, prompts_per_user, seed, counts)
    if not rows:
        raise ConfigurationError("prompts: there are no rows; give some with a user and a prompt.")
    users = dict.fromkeys(row.user_id for row in rows.values())
    report_unknown(writer.vocabulary, users)
    scorer, scored_by = _scorer(reward_model, judge, data, users, device, trust_classes)

    settings = {"model": origin(path), "by": scored_by, "answers": num_answers, "margin": min_margin, **asdict(request)}
    journal = Journal(unfinished, settings)
    if journal.replaced:
        sys.stderr.write(f"{unfinished} is of other settings: starting over.\n")
    left = [(key, row) for key, row in rows.items() if key not in journal.results]
    if len(left) < len(rows):
        sys.stderr.write(f"{len(rows) - len(left):,} of {len(rows):,} rows are done already ({unfinished}).\n")
    requests = [_request(row, request, writer) for _, row in left]
    for one in requests:  # before anything is computed
        writer.prepare(one)
    sampled = sample_candidates(writer, scorer, requests, num_answers, max_batch_rows)
    for place, candidates in tracked(sampled, "Making pairs", len(left)):
        journal.add(left[place][0], _result(candidates, min_margin))

    results = [(row, journal.results[key]) for key, row in rows.items()]
    counts.update(f"rows left out: {result['problem']}" for _, result in results if result["problem"])
    written = _write(output, results)
    journal.remove()
    console = plain_console(soft_wrap=True)
    for what, count in counts.items():
        console.print(f"{count:,} {what}")
    rewards = [torch.tensor([math.nan if r is None else r for r in result["rewards"]]) for _, result in results]
    console.print(described(rewards, [torch.tensor(result["tokens"]) for _, result in results]))
    console.print(f"{written:,} pairs of {len(users):,} users are in {output}")
    if hash_user_ids_with is not None or (prompts is None and data is not None and data.pseudonyms is not None):
        console.print("Users have their pseudonyms: train on them with --data.hash_user_ids_with null")


def _open(
    model: Path,
    run: Path | None,
    source: DataSource | None,
    device: str,
    trust_remote_code: bool,
    trust_classes: list[str] | None,
) -> tuple[Generator, PreferenceDataModule | None, Path]:
    """Return the policy, the data of its run if they are known, and its file."""
    if (model / SETTINGS).is_file():
        return open_writer(model, "model", device, trust_remote_code, trust_classes), None, model
    path = checkpoint_of(model)
    module = load_module(path, "model", trust_remote_code, trust_classes)
    data = data_of(open_run(path, run), source, module, trust_classes)
    return writer_of(module.to(device), path), data, path


def _scorer(
    reward_model: Path | None,
    judge: Judge | None,
    data: PreferenceDataModule | None,
    users: Iterable[str],
    device: str,
    trust_classes: list[str] | None,
) -> tuple[Scores, Any]:
    """Return who scores answers, and what identifies it, as a JSON value."""
    if reward_model is not None:
        path = checkpoint_of(reward_model, "reward_model")
        scorer = load_scorer(path, device, trust_classes)
        report_unknown(scorer.vocabulary, users, "the reward model")
        return scorer, origin(path)
    assert judge is not None  # for the type checker: one of the two is given
    if data is None:
        raise ConfigurationError("judge: the users are not known; give the model's run with --run.")
    settings = [type(judge).__qualname__, str(sorted(vars(judge).items()))]
    judge.prepare(data)
    return JudgeScorer(judge, people_of(data)), settings


def _result(candidates: Candidates, min_margin: float) -> dict[str, Any]:
    """Return what is kept of the answers to a request, as a JSON value."""
    pair = pair_of(candidates, min_margin)
    return {
        "pair": None if isinstance(pair, str) else asdict(pair),
        "problem": pair if isinstance(pair, str) else None,
        "rewards": [finite(reward) for reward in candidates.rewards],
        "tokens": candidates.lengths.tolist(),
    }


def _request(row: PromptRow, like: GenerationRequest, writer: Generator) -> GenerationRequest:
    """Return the request of a row, with its own seed."""
    assert like.seed is not None  # for the type checker: this command has one
    text = (row.user_text or "") if writer.user_model.uses_text else ""
    seed = hashed_seed(like.seed, row.user_id, row.prompt)
    return replace(like, prompt=row.prompt, user=row.user_id, user_text=text, tools=row.tools, seed=seed)


def _write(path: Path, results: list[tuple[PromptRow, Mapping[str, Any]]]) -> int:
    """Write the pairs and return their number."""
    pairs = [(row, result["pair"]) for row, result in results if result["pair"] is not None]
    with atomic_writer(path) as file:
        for row, pair in pairs:
            about = {name: value for name, value in asdict(row).items() if value is not None}
            file.write(json.dumps(about | pair, ensure_ascii=False).encode() + b"\n")
    return len(pairs)
