"""The command `adapt`: rows of new users from a few pairs each, and suggestions of pairs to ask."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prlhf_lightning.adaptation import Adapted, Encoded, adapt_users, encode_users, fit_prior, suggest
from prlhf_lightning.adaptation.margins import check_ranks_pairs
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import module_of, pick_device
from prlhf_lightning.data import DataSource, FeedbackLogSource, FileSource
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.privacy import hashed
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.user_rows import UserRows, user_rows
from prlhf_lightning.types import PreferenceBatch
from prlhf_lightning.utils.finite import are_finite
from prlhf_lightning.utils.io import check_output
from prlhf_lightning.utils.terminal import plain_console, printable

_SHOWN = 20
_LEAST_FOR_ACCURACY = 5


def adapt(
    model: Path,
    feedback: str,
    output: Path | None = None,
    suggest: int = 0,
    pool: Path | None = None,
    hash_user_ids_with: str | None = None,
    kinds: int | None = None,
    steps: int | None = None,
    columns: dict[str, str] | None = None,
    pool_columns: dict[str, str] | None = None,
    skip_known: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Add new users to a checkpoint, each with a row learned from their pairs; nothing else changes.

    Prints for each user how well their pairs are predicted from their other pairs (leave-one-out), the expected pair
    accuracy with its uncertainty, and how much the pairs have reduced the uncertainty about the user. A user model that
    reads pairs (`AmortizedUserModel`) needs no learning, and nothing is printed.

    Args:
        model: A checkpoint of `fit`, or the folder of its run.
        feedback: Pairs of the new users, in any format that training reads: user_id, prompt, chosen, rejected. Or the
            URL of a server's log, such as sqlite:///feedback.db; pairs of the checkpoint's users are left out.
        output: The checkpoint to write with the new users; without it, nothing is written.
        suggest: Number of pairs to suggest for each user: the most informative ones of the pool.
        pool: Pairs to choose from, in the same format; the user is optional and the order has no meaning.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training; new users are then also shown and stored
            by their pseudonyms.
        kinds: Number of kinds of trained users in the prior; by default the number that predicts trained users best.
        steps: Passes that learn how a user differs from their kind. By default 2 if `fit` estimated the users' codes
            (`LowRankUserModel`), and otherwise 0.
        columns: Mapping of fields to column names of `feedback`, as in `{user_id: worker}`.
        pool_columns: The same for `pool`.
        skip_known: Leave out users who are already in the checkpoint, as always for a server's log. Without it, the
            first one is an error.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    if suggest and pool is None:
        raise ConfigurationError("pool: `--suggest` chooses from a file of pairs; give it with --pool.")
    if pool is not None and not suggest:
        raise ConfigurationError("suggest: give the number of pairs to suggest for each user, as in `--suggest 5`.")
    if suggest < 0 or (steps or 0) < 0:
        raise ConfigurationError(f"suggest is {suggest} and steps {steps}; neither can be below 0.")
    if output is not None:
        check_output(output, "output")
    checkpoint = checkpoint_files.checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    user_rows(content, checkpoint).require_trained(checkpoint)
    module = module_of(content, checkpoint, "model", trust_remote_code, trust_classes).to(pick_device(device))
    if module.user_model.history_size and (suggest or steps):
        raise ConfigurationError(
            f"suggest, steps: {type(module.user_model).__name__} reads users off their pairs, which takes no steps and "
            "does not tell what to ask; leave both out."
        )
    from_log = "://" in feedback
    source: DataSource = FeedbackLogSource(feedback) if from_log else FileSource(feedback, columns=columns)
    source = hashed(source, hash_user_ids_with)
    leave_out = module.vocabulary.ids if (from_log or skip_known) and module.vocabulary else ()
    left_out: set[str] = set()
    pairs, _ = read_pairs(module, source, leave_out, left_out=left_out)
    known = [user_id for user_id in dict.fromkeys(pairs.user_ids) if module.vocabulary and user_id in module.vocabulary]
    if known:
        raise ConfigurationError(
            f"feedback: {known[0]!r} is in this checkpoint already. Leave known users' rows out with "
            "`--skip_known true`, or remove the user first (`users remove`)."
        )
    console = plain_console()
    if left_out:
        console.print(f"{len(left_out)} users left out, since they are in this checkpoint already")
    reads = module.user_model.history_size > 0
    found = _read(module, pairs, console) if reads else _learn(module, pairs, kinds, steps, console)
    if not are_finite([found.rows]):
        raise NonFiniteError(
            "feedback: the learned rows are infinite or NaN, so nothing is written. Check the pairs, and "
            "lower --steps if it is given."
        )
    if output is not None:
        write_users(content, output, found)
        console.print(f"Added to {output}")
    if pool is not None and isinstance(found, Adapted):
        with console.status("Choosing what to ask"):
            asked = read_pairs(module, FileSource(pool, columns=pool_columns), anyone=True, option="pool")
            _print_suggestions(module, found, *asked, suggest)


def _read(model: PersonalizedModel, pairs: PreferenceBatch, console: Console) -> Encoded:
    encoded = encode_users(model, pairs)
    console.print(f"{len(encoded.user_ids)} users read off {len(pairs)} pairs")
    return encoded


def _learn(
    model: PersonalizedModel, pairs: PreferenceBatch, kinds: int | None, steps: int | None, console: Console
) -> Adapted:
    start = time.perf_counter()
    with console.status("Learning the new users"):
        prior = fit_prior(model, pairs, kinds)
        if not prior.rank:
            raise ConfigurationError(
                "model: none of its users has a row that differs from a new user's, so there is no prior for "
                "new users. Train on users' pairs first."
            )
        adapted = adapt_users(model, pairs, prior=prior, steps=steps)
    console.print(_table(adapted))
    console.print(f"{len(adapted.user_ids)} users in {time.perf_counter() - start:.1f} s")
    return adapted


def write_users(content: dict[str, Any], output: Path, users: Adapted | Encoded) -> None:
    """Write a checkpoint with new users; all existing content stays bit-identical.

    Args:
        content: Content of the checkpoint of the model; it is changed.
        output: The file to write.
        users: The new users.
    """
    rows = UserRows(content)
    rows.add(users.user_ids)
    rows.set_last(users.rows)
    checkpoint_files.save(content, output)


def _table(adapted: Adapted) -> Table:
    table = Table(
        title="New users",
        title_justify="left",
        caption="Left out: share of a user's pairs that their other pairs predict. Expected: pair accuracy that the "
        "model expects on new pairs, ± what it may be off by as the user's kind is not certain. Settled: 0% before the "
        "first pair, 100% where the kind is certain.",
        caption_justify="left",
    )
    for name in ("user", "pairs", "accuracy, left out", "of the generic user", "expected accuracy", "settled"):
        is_user = name == "user"
        table.add_column(
            name, justify="left" if is_user else "right", overflow="fold", min_width=16 if is_user else None
        )
    hits, generic = (adapted.left_out() > 0.5).float(), (adapted.under[:, 0] > 0).float()
    sums = hits.new_zeros(2, len(adapted.user_ids)).index_add(1, adapted.users, torch.stack([hits, generic]))
    expected = torch.stack([adapted.expected_accuracy, adapted.expected_accuracy_std, adapted.settled], dim=1)
    for place, user_id in enumerate(adapted.user_ids[:_SHOWN]):
        count = int(adapted.counts[place])
        shown = [f"{value / count:.2f}" if count >= _LEAST_FOR_ACCURACY else "-" for value in sums[:, place].tolist()]
        table.add_row(printable(user_id), str(count), *shown, *_expected(expected[place]))
    if (total := int(adapted.counts.sum())) and len(adapted.user_ids) > 1:
        shown = [f"{value / total:.2f}" for value in sums.sum(1).tolist()]
        table.add_section()
        table.add_row(f"all {len(adapted.user_ids)}", str(total), *shown, *_expected(expected.mean(0)))
    return table


def _expected(values: Tensor) -> tuple[str, str]:
    accuracy, std, settled = values.tolist()
    return f"{accuracy:.2f} ± {std:.2f}", f"{max(0.0, settled):.0%}"


def _print_suggestions(
    model: PersonalizedModel, adapted: Adapted, pool: PreferenceBatch, wheres: list[str], count: int
) -> None:
    places, bits = suggest(model, adapted, pool, count)
    for user_id, own, told in zip(adapted.user_ids, places.tolist(), bits.tolist(), strict=True):
        for place, value in zip(own, told, strict=True):
            row = {"user_id": user_id, "ask": wheres[place], "bits": round(value, 3)}
            print(printable(json.dumps(row, ensure_ascii=False)))


def read_pairs(
    model: PersonalizedModel,
    source: DataSource,
    leave_out: Collection[str] = (),
    anyone: bool = False,
    left_out: set[str] | None = None,
    option: str = "feedback",
) -> tuple[PreferenceBatch, list[str]]:
    """Return the tokenized pairs of a source.

    Args:
        model: The model, with its tokenization settings.
        source: The source, of which the training split is read.
        leave_out: Users whose rows are skipped.
        anyone: Whether the user is optional.
        left_out: Collects the users whose rows were skipped.
        option: Name of the option, for messages.

    Returns:
        The pairs, and the file and line of each.

    Raises:
        ConfigurationError: There is no pair, or the model was trained on feedback of another kind.
        FeedbackFormatError: A row is not a pair.
    """
    check_ranks_pairs(model)  # before errors about fields that such a model does not need
    columns = Columns.from_mapping(source.columns)
    blank: Mapping[str, Any] = {columns.user_id: "anyone"} if anyone else {}
    unwanted, passed_over = frozenset(leave_out), set[str]() if left_out is None else left_out
    wheres, rows = [], []
    for where, row in source.rows("train"):
        user_id = row.get(columns.user_id)
        if isinstance(user_id, str) and user_id in unwanted:
            passed_over.add(user_id)
        else:
            wheres.append(where)
            rows.append({**blank, **row})
    if not rows:
        whose = " of a new user" if passed_over else ""
        raise ConfigurationError(f"{option}: there is no row{whose} in it; give one pair or more.")
    found = to_batch(FeedbackTokenizer(model.policy.tokenizer, model.tokenization), rows, wheres, columns)
    if found is None:
        raise ConfigurationError(
            f"{wheres[0]} and all other rows: both completions are the same tokens once they are cut."
        )
    return found


def to_batch(
    tokenize: FeedbackTokenizer,
    rows: Sequence[Mapping[str, Any]],
    wheres: Sequence[str],
    columns: Columns = Columns(),  # noqa: B008 - frozen, hence safe to share
) -> tuple[PreferenceBatch, list[str]] | None:
    """Return rows tokenized as one batch.

    Args:
        tokenize: The model's tokenizer.
        rows: Rows that `parse_record` reads.
        wheres: File and line of each.
        columns: The column of each field.

    Returns:
        The pairs and their files and lines, without dropped rows and ties; None if nothing is left.
    """
    records = [parse_record(row, where, columns) for row, where in zip(rows, wheres, strict=True)]
    names = ("user_text", "prompt", "chosen", "rejected")
    kept = [
        (number, {"user_id": record.user_id, "record": number} | {f"{name}_ids": getattr(ids, name) for name in names})
        for number, (record, ids) in enumerate(zip(records, tokenize(records, wheres), strict=True))
        if ids is not None and not ids.tie
    ]
    return (collate([row for _, row in kept]), [wheres[number] for number, _ in kept]) if kept else None
