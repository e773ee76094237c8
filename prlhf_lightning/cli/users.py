"""The commands `users ...`: list, show, add, remove and export the users of a checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from prlhf_lightning.cli.byte_search import ByteSearch, Place, Vectors, id_bytes, is_of_no_user, texts
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.erasure import report_other_copies
from prlhf_lightning.data import Pseudonyms, UserVocabulary
from prlhf_lightning.data.users import look_alikes
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.user_rows import UserRows, check_known_users, user_rows
from prlhf_lightning.utils.finite import check_finite, wrong_numbers
from prlhf_lightning.utils.io import check_output, check_output_folder, not_left_empty, write_together
from prlhf_lightning.utils.progress import progress_bars
from prlhf_lightning.utils.terminal import listed, printable

_NEAREST = 5
_TOLD = 20  # users with a printed result, if many are erased at once


def list_users(model: Path) -> None:
    """List the users of a checkpoint, in the order of their rows.

    Columns: the norm of a user's row, its distance from the generic user's, and the number of steps with the user (- if
    the checkpoint does not store it).

    Args:
        model: A checkpoint file of `fit`, or the folder of its run.
    """
    rows = _open(checkpoint_files.checkpoint_of(model))
    vectors, steps = rows.vectors(), rows.steps()
    norms, distances = vectors.norm(dim=1), (vectors - vectors[0]).norm(dim=1)
    print(f"{'norm':>10} {'from generic':>12} {'steps':>8}  user_id")
    for row, user_id in enumerate(("(generic user)", *rows.vocabulary.ids)):
        count = "-" if steps is None or row == 0 else int(steps[row])
        print(f"{norms[row]:10.4f} {distances[row]:12.4f} {count:>8}  {printable(user_id)}")


def show(model: Path, user: str) -> None:
    """Show one user of a checkpoint: row, steps, distance from the generic user, nearest users, shares of clusters.

    Args:
        model: A checkpoint file of `fit`, or the folder of its run.
        user: The user's id.
    """
    _check_ids([user])
    rows = _open(checkpoint_files.checkpoint_of(model))
    row = rows.row(user)
    vectors, steps = rows.vectors(), rows.steps()
    print(f"user_id       {printable(user)}")
    print(f"row           {row} of {len(rows.vocabulary) - 1}")
    print(f"steps         {'-' if steps is None else int(steps[row])}")
    print(f"norm          {vectors[row].norm():.4f}")
    print(f"from generic  {(vectors[row] - vectors[0]).norm():.4f}")
    distances = (vectors - vectors[row]).norm(dim=1)
    distances[[0, row]] = torch.inf
    nearest = [other for other in distances.argsort(stable=True).tolist() if distances[other] < torch.inf][:_NEAREST]
    print(
        "nearest       " + ", ".join(f"{printable(rows.vocabulary.ids[n - 1])} ({distances[n]:.4f})" for n in nearest)
    )
    for name, table in rows.tables.items():
        print(f"{name}  {list(table[row].shape)} {str(table.dtype).removeprefix('torch.')}")
        if name in rows.shares:
            shares = table[[row, 0]].float().softmax(-1).tolist()
            for who, values in zip(("user", "generic"), shares, strict=True):
                print(f"  shares, {who:8}" + " ".join(f"{value:.3f}" for value in values))


def add(
    model: Path, user: str | list[str] | None = None, user_file: Path | None = None, output: Path | None = None
) -> None:
    """Add users to a checkpoint: each is the generic user until trained further.

    Args:
        model: A checkpoint file of `fit`, or the folder of its run (its newest checkpoint is used).
        user: Ids of the new users, as in `--user ann bob`.
        user_file: A UTF-8 text file with one id per line, or a .json file with a list of ids.
        output: The file to write; the checkpoint itself by default.
    """
    user_ids = _given(user, user_file)
    for user_id in user_ids:
        try:
            user_id.encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"user: {user_id!r} is not valid Unicode; give another id.") from error
    if output is not None:
        check_output(output, "output")
    checkpoint = checkpoint_files.checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    _rows_of(content, checkpoint).add(user_ids)
    _save(content, checkpoint, output or checkpoint)
    print(f"{len(user_ids)} added: {output or checkpoint}")


def remove(
    model: Path,
    user: str | list[str] | None = None,
    user_file: Path | None = None,
    output: Path | None = None,
    all: bool = False,
    skip_unknown: bool = False,
    hash_user_ids_with: str | None = None,
    also_search: list[Path] | None = None,
) -> None:
    """Erase users from a checkpoint: ids, vectors and optimizer state; then search the file for traces.

    Nothing is written unless all given users exist. Each file is read and written once, for any number of users. Then
    all other files of the run and of neighboring runs are searched for the ids. Shared weights, which were trained on
    the users' judgments, do not change; see docs/checkpoints.md.

    Args:
        model: A checkpoint file of `fit`; with `--all true`, any of the run's, or the run's folder.
        user: Ids of the users, as in `--user ann bob`.
        user_file: A UTF-8 text file with one id per line, or a .json file with a list of ids, which may hold line
            breaks.
        output: The file to write; the checkpoint itself by default.
        all: Erase the users from every checkpoint in the folder, each in place.
        skip_unknown: Continue if users are in none of the checkpoints, as after a command that was killed; other files
            are searched for them too.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training, to give ids as in the data; files are
            searched for both.
        also_search: More files and folders to search, such as your data.
    """
    user_ids = given = _given(user, user_file)
    if hash_user_ids_with is not None:
        user_ids = [*map(Pseudonyms.load(hash_user_ids_with), given)]
    if all and output:
        raise ConfigurationError("output: `--all true` changes each checkpoint of the folder in place; leave it out.")
    if output is not None:
        check_output(output, "output")
    for path in also_search or ():
        if not path.exists():
            raise ConfigurationError(f"also_search: {path} does not exist; give a file or a folder.")
    folder, targets = _targets(model, all)
    known: dict[Path, list[str]] = {}
    anyone: dict[str, None] = {}
    failed: dict[Path, str] = {}
    for path in targets:
        try:
            vocabulary = _open(path).vocabulary
        except PRLHFError as error:
            if not all:
                raise
            failed[path] = str(error)
        else:
            known[path] = [user_id for user_id in user_ids if user_id in vocabulary]
            anyone |= dict.fromkeys(vocabulary.ids)
    if not skip_unknown:
        check_known_users(user_ids, UserVocabulary(anyone), more="; `--skip_unknown true` goes on without")
    done = []
    with progress_bars() as progress:
        for path in progress.track(known, description="Checkpoints"):
            if not known[path]:
                print(f"{path}: holds none of them")
            try:
                if known[path]:
                    _erase(path, output or path, known[path])
                done.append(output or path)
            except PRLHFError as error:  # continue with the other files
                failed[path] = str(error)
    for path, why in failed.items():
        print(f"{path}: NOT DONE: {printable(why)}")
    _tell_look_alikes(user_ids, anyone)
    folders = dict.fromkeys((folder, *(Path(os.path.realpath(path)).parent for path in targets)))
    report_other_copies([*folders], done, [*dict.fromkeys((*user_ids, *given))], also_search or ())
    if failed:
        reasons = "\n".join(failed.values())
        raise ConfigurationError(
            reasons if len(targets) == 1 else f"{len(failed)} of {len(targets)} files are not done:\n{reasons}"
        )


def export(model: Path, output: Path) -> None:
    """Write the users' vectors as safetensors with user ids as keys, and a description of their layout.

    `users.safetensors` has one vector per user: the user's rows of all tables, concatenated. `shared.safetensors` has
    the rest of the user model, and the generic user's rows. `users.json` describes which part of a vector belongs to
    which table.

    Args:
        model: A checkpoint file of `fit`, or the folder of its run.
        output: The folder to write; created if missing.
    """
    with not_left_empty(output):
        check_output_folder(output, "output")
        checkpoint = checkpoint_files.checkpoint_of(model)
        content = read_checkpoint(checkpoint, "model")
        check_finite(content, f"model: {checkpoint}")
        rows = user_rows(content, checkpoint)
        vectors = rows.vectors()
        users = {user_id: vectors[row].clone() for row, user_id in enumerate(rows.vocabulary.ids, start=1)}
        if "__metadata__" in users:
            raise ConfigurationError(
                "user: safetensors has no room for an id of '__metadata__'; remove that user first."
            )
        weights, tables = content["state_dict"], rows.tables
        rest = {n: w.clone() for n, w in weights.items() if n.startswith("user_model.") and n not in tables}
        layout, start = {}, 0
        for name, table in tables.items():
            layout[name] = {"start": start, "stop": start + table[0].numel(), "shape": list(table.shape[1:])}
            start += table[0].numel()
        about = {"format": 1, "users": len(users), "width": start, "tables": layout, "shared": sorted(rest)}
        files = {
            "users.safetensors": safetensors_bytes(users),
            "shared.safetensors": safetensors_bytes(rest | {f"generic.{n}": t[0].clone() for n, t in tables.items()}),
            "users.json": json.dumps(about, indent=2).encode(),
        }
        write_together({output / name: raw for name, raw in files.items()})
    print(f"{len(users)} users are in {output}")


def _open(path: Path) -> UserRows:
    return _rows_of(read_checkpoint(path, "model"), path)


def _rows_of(content: dict[str, Any], path: Path) -> UserRows:
    """Return the users of a checkpoint; with non-finite weights, warn, since users can still be erased."""
    if wrong := wrong_numbers(content):
        sys.stderr.write(f"{path} holds numbers that are infinite or NaN: {printable(wrong)}\n")
    return user_rows(content, path)


def _targets(model: Path, all: bool) -> tuple[Path, list[Path]]:
    """Return the folder of a checkpoint and its files to change."""
    if not model.is_dir():
        folder = model.parent
        beside = [path for path in (*checkpoint_files.in_order(folder), *_baseline(folder)) if path.is_file()]
        return folder, _each_once([model, *(beside if all else ())])
    if not all:
        raise ConfigurationError(
            f"model: {model} is a folder. Give one checkpoint, or erase the users from all of them with `--all true`."
        )
    folder = model / "checkpoints" if (model / "checkpoints").is_dir() else model
    targets = [path for path in (*checkpoint_files.in_order(folder), *_baseline(folder)) if path.is_file()]
    if not targets:
        raise ConfigurationError(f"model: there is no checkpoint file in {folder}; give a run's folder.")
    return folder, _each_once(targets)


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Return files without links to other files of them."""
    return [*{os.path.realpath(path): path for path in reversed([*paths])}.values()][::-1]


def _baseline(folder: Path) -> list[Path]:
    """Return the baseline checkpoints of `fit --train_baseline true`, which also name the run's users."""
    beside = folder.parent / "baseline"
    return checkpoint_files.in_order(beside) if folder.name == "checkpoints" and beside.is_dir() else []


def _check_ids(user_ids: Sequence[object]) -> None:
    """Refuse ids from Python that are not strings: a number would be an unknown user."""
    for user_id in user_ids:
        if not isinstance(user_id, str):
            kind = type(user_id).__name__
            raise ConfigurationError(f"user: {user_id!r} is of type {kind}; ids are strings: {str(user_id)!r}.")


def _given(user: str | list[str] | None, user_file: Path | None) -> list[str]:
    """Return the unique ids of the command line and of a file."""
    user_ids = [user] if isinstance(user, str) else user or []
    if not isinstance(user_ids, list | tuple):
        raise ConfigurationError(f"user: {user!r} is of type {type(user).__name__}; give a string, or a list of them.")
    user_ids = [*user_ids]
    _check_ids(user_ids)
    if user_file is not None:
        user_ids += _in_file(user_file)
    if not user_ids or not all(map(str.strip, user_ids)):
        raise ConfigurationError("user: give an id, or a file of ids with --user_file, none of them empty.")
    return list(dict.fromkeys(user_ids))


def _in_file(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix != ".json":
            return [line for raw in text.split("\n") if (line := raw.removesuffix("\r"))]  # only \n ends an id
        user_ids = json.loads(text)
    except (OSError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "lines of UTF-8"
        raise ConfigurationError(f"user_file: {path} can't be read as {kind}: {error}") from error
    if not isinstance(user_ids, list):
        raise ConfigurationError(f"user_file: {path} is no list of ids; write one, as in " + '["ann", "bob"].')
    _check_ids(user_ids)
    return user_ids


def _save(content: dict[str, Any], source: Path, target: Path) -> None:
    """Write a checkpoint. In place, it keeps its modification time, by which a run's checkpoints are sorted."""
    in_place = target.exists() and os.path.samefile(source, target)
    checkpoint_files.save(content, target, as_old_as=source if in_place else None)


def _erase(source: Path, target: Path, user_ids: Sequence[str]) -> None:
    """Write a checkpoint without some users, and verify that the file holds no trace of them."""
    content = read_checkpoint(source, "model")
    users = user_rows(content, source)
    rows = users.vocabulary.rows(user_ids).tolist()
    gone = set(rows)
    vectors = Vectors(users.remembered(), rows, stay=users.new_rows())  # added users have new rows
    users.keep([row for row in range(1, len(users.vocabulary)) if row not in gone])
    _save(content, source, target)
    written = [*texts(read_checkpoint(target, "model"))]
    with target.open("rb") as file:
        found = ByteSearch([*vectors, *map(id_bytes, user_ids)]).found_in(file, text=False)
    print(f"{target}: searched all {target.stat().st_size:,} bytes")
    wanted, places = set(user_ids), dict[str, dict[Place, None]]()
    for place, text in written:
        if text in wanted:
            places.setdefault(text, {})[place] = None
    foreign = {user_id: [place for place in found if not is_of_no_user(place)] for user_id, found in places.items()}
    with_vectors = vectors.whose(found)
    left = {user_id for user_id, row in zip(user_ids, rows, strict=True) if foreign.get(user_id) or row in with_vectors}
    # Users with traces first; of many others, only some are listed.
    order = sorted(zip(user_ids, rows, strict=True), key=lambda one: one[0] not in left)
    for user_id, row in order[: max(_TOLD, len(left))]:
        said = "nothing left"
        if user_id in left:
            where = listed([".".join(place) for place in foreign.get(user_id, ())])
            said = "STILL THERE" + (f", in {where}" if where else "")
        elif user_id in places:
            said += f"; the same letters are a name or a setting: {listed(['.'.join(one) for one in places[user_id]])}"
        elif longer := sorted({text for _, text in written if user_id in text}):
            said += f"; its letters are also a part of {listed(longer)}"
        elif id_bytes(user_id) in found:
            said += "; its letters also occur, by chance, among the bytes of numbers"
        print(f"  {printable(user_id)} and {vectors.count(row)} vectors: {said}")
    if rest := [row for _, row in order[max(_TOLD, len(left)) :]]:
        print(f"  {len(rest):,} others and {sum(map(vectors.count, rest)):,} vectors: nothing left")
    if left:
        named = [user_id for user_id in user_ids if user_id in left]
        raise ConfigurationError(f"model: {target} still holds {listed(named)}, in a part unknown to this tool.")


def _tell_look_alikes(user_ids: Sequence[str], anyone: Iterable[str]) -> None:
    """Print remaining users whose ids look like erased ones: they may be the same person."""
    gone = set(user_ids)
    groups = look_alikes((*user_ids, *anyone))
    if stay := [repr(user_id) for group in groups if group[0] in gone for user_id in group if user_id not in gone]:
        print(f"Remaining ids that look similar: {listed(stay)}; remove them too if they are the same person's.")
