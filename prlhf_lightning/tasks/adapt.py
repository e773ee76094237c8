"""Welcome new users: learn their rows from a few pairs each, and choose what to ask them next."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prlhf_lightning import checkpoint_files
from prlhf_lightning.adaptation import Adapted, adapt_users, fit_prior, suggest
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.collate import collate
from prlhf_lightning.data.privacy import Pseudonyms
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.tasks.checkpoints import load_module, read_checkpoint
from prlhf_lightning.tasks.user_rows import UserRows
from prlhf_lightning.types import PreferenceBatch

_SHOWN = 20
_LEAST_FOR_ACCURACY = 5


def adapt(
    checkpoint: Path,
    feedback: Path,
    output: Path | None = None,
    suggest: int = 0,
    pool: Path | None = None,
    hash_user_ids_with: str | None = None,
    kinds: int = 4,
    steps: int = 0,
    max_prompt_length: int = 512,
    max_completion_length: int = 512,
    chat_template: bool = False,
) -> None:
    """Add new users to a checkpoint, each with a row learned from their pairs; nothing else in it changes.

    Prints for each user how well their pairs are predicted from their others (leave-one-out), and how uncertain the
    user still is, on a scale on which the trained users' spread is about 1.

    Args:
        checkpoint: A checkpoint of `fit`.
        feedback: Pairs of the new users, in any format that training reads: user_id, prompt, chosen, rejected.
        output: The checkpoint to write, with the new users in it; nothing is written if none is given.
        suggest: Name so many pairs of the pool for each user, those whose answers would tell most.
        pool: Pairs to choose from, in the same format but for the user, who may be left out, and in no order.
        hash_user_ids_with: What `data.hash_user_ids_with` was in training; new users too are then shown and stored by
            their pseudonyms.
        kinds: Most kinds of trained users that a new one is compared with.
        steps: Passes in which a user is told apart from their kind; worth it with many pairs a user.
        max_prompt_length: As the model was trained with.
        max_completion_length: As the model was trained with.
        chat_template: As the model was trained with.
    """
    if suggest and pool is None:
        raise ConfigurationError("pool: `--suggest` chooses from a file of pairs; name it with --pool.")
    if suggest < 0 or steps < 0:
        raise ConfigurationError(f"suggest is {suggest} and steps {steps}; neither can be below 0.")
    model = load_module(checkpoint, "checkpoint")
    settings = TokenizationSettings(max_prompt_length, max_completion_length, chat_template=chat_template)
    pairs, _ = read_pairs(model, feedback, settings)
    if hash_user_ids_with is not None:
        pairs = replace(pairs, user_ids=tuple(map(Pseudonyms.load(hash_user_ids_with), pairs.user_ids)))
    known = [user_id for user_id in dict.fromkeys(pairs.user_ids) if model.vocabulary and user_id in model.vocabulary]
    if known:
        raise ConfigurationError(
            f"feedback: {known[0]!r} is in this checkpoint already. Leave known users' rows out, or remove the user "
            "first (`users remove`)."
        )
    console, start = Console(), time.perf_counter()
    with console.status("Learning the new users"):
        adapted = adapt_users(model, pairs, prior=fit_prior(model, pairs, kinds), steps=steps)
    console.print(_table(adapted))
    console.print(f"{len(adapted.user_ids)} users in {time.perf_counter() - start:.1f} s")
    if pool is not None and suggest:
        with console.status("Choosing what to ask"):
            _print_suggestions(model, adapted, *read_pairs(model, pool, settings, anyone=True), suggest)
    if output is not None:
        write_users(checkpoint, output, adapted)
        console.print(f"Added to {output}")


def read_pairs(
    model: PersonalizedLM, path: Path, settings: TokenizationSettings, anyone: bool = False
) -> tuple[PreferenceBatch, list[str]]:
    """Read and tokenise a file of pairs.

    Args:
        model: Whose tokenizer is used.
        path: A file of any format that training reads.
        settings: How texts become ids.
        anyone: Whether rows may do without a user.

    Returns:
        The pairs, and where each stands in the file.
    """
    wheres, rows = [], []
    blank: Mapping[str, Any] = {"user_id": "anyone"} if anyone else {}
    for where, row in FileSource(path).rows("train"):
        wheres.append(where)
        rows.append({**blank, **row})
    if not rows:
        raise ConfigurationError(f"{path}: there is no row in it; give one pair or more.")
    records = [parse_record(row, where) for row, where in zip(rows, wheres, strict=True)]
    tokenized = FeedbackTokenizer(model.policy.tokenizer, settings)(records, wheres)
    names = ("user_text", "prompt", "chosen", "rejected")
    kept = [
        (number, {"user_id": record.user_id, "record": number} | {f"{n}_ids": getattr(ids, n) for n in names})
        for number, (record, ids) in enumerate(zip(records, tokenized, strict=True))
        if ids is not None and not ids.tie
    ]
    if not kept:
        raise ConfigurationError(f"{path}: in every row both completions are the same tokens once they are cut.")
    return collate([row for _, row in kept]), [wheres[number] for number, _ in kept]


def write_users(checkpoint: Path, output: Path, adapted: Adapted) -> None:
    """Write a copy of a checkpoint with the adapted users in it; all that was there stays as it was, bit by bit.

    Args:
        checkpoint: The checkpoint of the model that the users were adapted to.
        output: The file to write.
        adapted: The new users.
    """
    content = read_checkpoint(checkpoint, "checkpoint")
    rows = UserRows(content)
    rows.add(adapted.user_ids)
    rows.set_last(adapted.rows)
    checkpoint_files.save(content, output)


def _table(adapted: Adapted) -> Table:
    table = Table(title="New users", title_justify="left", caption_justify="left")
    for name in ("user", "pairs", "accuracy, left out", "of the generic user", "uncertainty"):
        table.add_column(name, justify="left" if name == "user" else "right")
    hits, generic = (adapted.left_out() > 0.5).float(), (adapted.under[:, 0] > 0).float()
    sums = torch.zeros(2, len(adapted.user_ids)).index_add(1, adapted.users, torch.stack([hits, generic]))
    for place, user_id in enumerate(adapted.user_ids[:_SHOWN]):
        count = int(adapted.counts[place])
        shown = [f"{value / count:.2f}" if count >= _LEAST_FOR_ACCURACY else "-" for value in sums[:, place].tolist()]
        name = user_id if user_id.isprintable() else json.dumps(user_id)
        table.add_row(name, str(count), *shown, f"{adapted.uncertainty[place]:.2f}")
    if (total := int(adapted.counts.sum())) and len(adapted.user_ids) > 1:
        shown = [f"{value / total:.2f}" for value in sums.sum(1).tolist()]
        table.add_section()
        table.add_row(f"all {len(adapted.user_ids)}", str(total), *shown, f"{adapted.uncertainty.mean():.2f}")
    return table


def _print_suggestions(
    model: PersonalizedLM, adapted: Adapted, pool: PreferenceBatch, wheres: list[str], count: int
) -> None:
    places, bits = suggest(model, adapted, pool, count)
    for user_id, own, told in zip(adapted.user_ids, places.tolist(), bits.tolist(), strict=True):
        for place, value in zip(own, told, strict=True):
            print(json.dumps({"user_id": user_id, "ask": wheres[place], "bits": round(value, 3)}, ensure_ascii=False))
