"""The command `adapt`: rows of new users from a few pairs each, and suggestions of pairs to ask."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from prlhf_lightning.adaptation import (
    Adapted,
    AdaptedHeads,
    Encoded,
    adapt_heads,
    adapt_users,
    encode_users,
    fit_prior,
    suggest,
    suggest_pairs,
)
from prlhf_lightning.adaptation.margins import check_ranks_pairs
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import module_of, pick_device, reward_model_of
from prlhf_lightning.cli.new_pairs import read_rows, tokenized
from prlhf_lightning.data import DataSource, FeedbackLogSource, FileSource
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.privacy import hashed
from prlhf_lightning.data.records import Columns
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.rewards import JudgedPairs
from prlhf_lightning.training import PersonalizedRewardModel, checkpoint_files
from prlhf_lightning.training.checkpoint_entry import is_reward_model
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
    reads pairs (`AmortizedUserModel`) needs no learning, and nothing is printed. Users of a reward model are learned in
    closed form.

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
    learner: Any  # each reads pairs in the form of its model
    if is_reward_model(content):
        if kinds is not None or steps is not None:
            raise ConfigurationError(
                "kinds, steps: a reward model learns new users in closed form, under the prior of training; leave both "
                "out."
            )
        reward_model = reward_model_of(content, checkpoint, "model", trust_classes)
        learner = _OfRewardModel(reward_model.to(pick_device(device)))
    else:
        module = module_of(content, checkpoint, "model", trust_remote_code, trust_classes).to(pick_device(device))
        if module.user_model.history_size and (suggest or steps):
            raise ConfigurationError(
                f"suggest, steps: {type(module.user_model).__name__} reads users off their pairs, which takes no steps "
                "and does not tell what to ask; leave both out."
            )
        learner = _OfPolicy(module, kinds, steps)
    from_log = "://" in feedback
    source: DataSource = FeedbackLogSource(feedback) if from_log else FileSource(feedback, columns=columns)
    source = hashed(source, hash_user_ids_with)
    vocabulary = learner.model.vocabulary
    leave_out = vocabulary.ids if (from_log or skip_known) and vocabulary else ()
    left_out: set[str] = set()
    pairs = learner.read(source, leave_out, left_out=left_out)[0]
    known = [user_id for user_id in dict.fromkeys(pairs.user_ids) if vocabulary and user_id in vocabulary]
    if known:
        raise ConfigurationError(
            f"feedback: {known[0]!r} is in this checkpoint already. Leave known users' rows out with "
            "`--skip_known true`, or remove the user first (`users remove`)."
        )
    console = plain_console()
    if left_out:
        console.print(f"{len(left_out)} users left out, since they are in this checkpoint already")
    start = time.perf_counter()
    with console.status("Learning the new users"):
        found: Adapted | AdaptedHeads | Encoded = learner.learn(pairs)
    if isinstance(found, Encoded):
        console.print(f"{len(found.user_ids)} users read off {len(pairs)} pairs")
    else:
        console.print(_table(found))
        console.print(f"{len(found.user_ids)} users in {time.perf_counter() - start:.1f} s")
    if not are_finite([found.rows]):
        raise NonFiniteError(
            "feedback: the learned rows are infinite or NaN, so nothing is written. Check the pairs, and "
            "lower --steps if it is given."
        )
    if output is not None:
        write_users(content, output, found)
        console.print(f"Added to {output}")
    if pool is not None and not isinstance(found, Encoded):
        with console.status("Choosing what to ask"):
            asked, wheres = learner.read(FileSource(pool, columns=pool_columns), anyone=True, option="pool")
            _print_suggestions(found.user_ids, wheres, *learner.suggest(found, asked, suggest))


class _OfPolicy:
    """Learns users of a policy."""

    def __init__(self, model: PersonalizedModel, kinds: int | None, steps: int | None) -> None:
        self.model, self._kinds, self._steps = model, kinds, steps

    def read(self, source: DataSource, *args: Any, **how: Any) -> tuple[PreferenceBatch, list[str]]:
        return read_pairs(self.model, source, *args, **how)

    def learn(self, pairs: PreferenceBatch) -> Adapted | Encoded:
        if self.model.user_model.history_size:
            return encode_users(self.model, pairs)
        prior = fit_prior(self.model, pairs, self._kinds)
        if not prior.rank:
            raise ConfigurationError(
                "model: none of its users has a row that differs from a new user's, so there is no prior for "
                "new users. Train on users' pairs first."
            )
        return adapt_users(self.model, pairs, prior=prior, steps=self._steps)

    def suggest(self, found: Any, pool: PreferenceBatch, count: int) -> tuple[Tensor, Tensor]:
        return suggest(self.model, found, pool, count)


class _OfRewardModel:
    """Learns users of a reward model."""

    def __init__(self, model: PersonalizedRewardModel) -> None:
        self.model = model
        self._tokenize = FeedbackTokenizer(model.backbone.tokenizer, model.tokenization)

    def read(self, source: DataSource, *args: Any, **how: Any) -> tuple[JudgedPairs, list[str]]:
        rows, wheres = read_rows(self._tokenize, source, *args, **how)
        return JudgedPairs.of_rows(rows), wheres

    def learn(self, pairs: JudgedPairs) -> AdaptedHeads:
        return adapt_heads(self.model, pairs)

    def suggest(self, found: Any, pool: JudgedPairs, count: int) -> tuple[Tensor, Tensor]:
        return suggest_pairs(self.model, found, pool, count)


def write_users(content: dict[str, Any], output: Path, users: Adapted | AdaptedHeads | Encoded) -> None:
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


def _table(adapted: Adapted | AdaptedHeads) -> Table:
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
    hits, generic = (adapted.left_out() > 0.5).float(), (adapted.generic_margins > 0).float()
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


def _print_suggestions(user_ids: Sequence[str], wheres: Sequence[str], places: Tensor, bits: Tensor) -> None:
    for user_id, own, told in zip(user_ids, places.tolist(), bits.tolist(), strict=True):
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
    tokenize = FeedbackTokenizer(model.policy.tokenizer, model.tokenization)
    rows, wheres = read_rows(tokenize, source, leave_out, anyone, left_out, option)
    return collate(rows), wheres


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
    kept, places = tokenized(tokenize, rows, wheres, columns)
    return (collate(kept), places) if kept else None
