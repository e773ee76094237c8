"""What else a run, and the runs beside it, have written about users who were erased from a checkpoint."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from prlhf_lightning import checkpoint_files
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.export_checksums import SETTINGS
from prlhf_lightning.tasks.checkpoints import read_checkpoint
from prlhf_lightning.tasks.model_card import is_card
from prlhf_lightning.tasks.terminal import listed
from prlhf_lightning.tasks.traces import occurs, path_forms, written_forms
from prlhf_lightning.tasks.user_rows import rows_of


def report_other_copies(folder: Path, done: Path, user_ids: Sequence[str]) -> None:
    """Print which other files and folders name users.

    Args:
        folder: The folder of a checkpoint that they were erased from.
        done: The file that was written.
        user_ids: The users.
    """
    exports: dict[Path, list[str]] = {}
    named: dict[Path, list[str]] = {}
    for root, path in _files(folder):
        if done.exists() and os.path.samefile(path, done):
            continue
        if path.is_dir():
            print(f"{path} was written in shards and was not looked into.")
            continue
        in_path = _in_path(root, path, user_ids)
        try:
            found = _in_file(path, user_ids)
        except OSError as error:
            print(f"{path} can't be read and was not looked into: {error.strerror}")
            found = []
        if export := next((one for one in path.parents if one.is_relative_to(root) and _is_export(one)), None):
            exports[export] = list(dict.fromkeys([*exports.get(export, ()), *found, *in_path.values()]))
            continue
        for part, user_id in in_path.items():
            named.setdefault(part, []).append(user_id)
        if found and path.suffix == ".ckpt":
            _report_checkpoint(path, found)
        elif found and path.suffix == ".partial":
            print(f"{path}, which a killed process left, names {listed(found)}: delete it.")
        elif found:
            print(f"{path} names {listed(found)}, or has the letters by chance: see to it yourself.")
    for part, ids in named.items():
        print(f"{part} has {listed(list(dict.fromkeys(ids)))} in its own name: see to it yourself.")
    for export, ids in exports.items():
        if ids:
            print(
                f"{export} is an exported model with {listed(ids)} in it, vectors included: delete it, and export it "
                "again."
            )


def _in_file(path: Path, user_ids: Sequence[str]) -> list[str]:
    forms = [(user_id, form) for user_id in user_ids for form in written_forms(user_id)]
    there = occurs(path, [form for _, form in forms])
    return list(dict.fromkeys(user_id for (user_id, _), is_there in zip(forms, there, strict=True) if is_there))


def _in_path(root: Path, path: Path, user_ids: Sequence[str]) -> dict[Path, str]:
    """Return the outermost part of a path, from a run's folder on, that has a user's id as a word of its name."""
    parts = [path, *(one for one in path.parents if one.is_relative_to(root))]
    found = {}
    for user_id in user_ids:
        words = [re.compile(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])") for form in path_forms(user_id)]
        if part := next((one for one in reversed(parts) if any(word.search(one.name) for word in words)), None):
            found[part] = user_id
    return found


def _is_export(folder: Path) -> bool:
    return (folder / SETTINGS).is_file() or is_card(folder / "README.md")


def _report_checkpoint(path: Path, found: Sequence[str]) -> None:
    try:
        known = rows_of(read_checkpoint(path, "model"), path).vocabulary
    except PRLHFError:
        print(f"{path} can't be read, and names {listed(found)}: delete it.")
        return
    if still := [user_id for user_id in found if user_id in known]:
        print(f"{path} still holds {listed(still)}:")
        if all(map(str.isprintable, (str(path), *still))):
            options = " ".join(shlex.quote(f"--user={user_id}") for user_id in still)
        else:
            options = "--user_file FILE"  # an id a line: a terminal can't show them as they are
        print(f"  python -m prlhf_lightning users remove --model {shlex.quote(str(path))} {options}")
        print("  (or, for all checkpoints beside it as well, with --all true)")


def _files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield what a run, and the others beside it, have written, each file with the folder of its run."""
    run = folder.parent if folder.name == "checkpoints" else folder
    if run != folder or (run / "config.yaml").is_file():
        for one in (run, *_runs_beside(run)):
            for path in _files_in(one):
                yield one, path
    else:  # just a folder with checkpoints in it, which may have anything else as well
        for path in (*checkpoint_files.in_order(folder), *sorted(folder.glob(".*.partial"))):
            yield folder, path


def _runs_beside(run: Path) -> list[Path]:
    """Return the other runs of the same folder, and of the folders in it, whatever a logger has named them."""
    signs = [sign for name in ("checkpoints", "config.yaml") for sign in run.parent.glob(f"*/{name}")]
    signs += [sign for name in ("checkpoints", "config.yaml") for sign in run.parent.glob(f"*/*/{name}")]
    found = {sign.parent.resolve(): sign.parent for sign in sorted(signs)}
    return [path for real, path in found.items() if not real.is_relative_to(run.resolve())]


def _files_in(run: Path) -> Iterator[Path]:
    sharded = {path for path in run.rglob("*.ckpt") if path.is_dir()}
    for path in sorted(run.rglob("*")):
        if path in sharded or (path.is_file() and not sharded & set(path.parents)):
            yield path
