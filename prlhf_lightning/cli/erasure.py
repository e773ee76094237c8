"""Search for other copies of erased users in and near a run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

from prlhf_lightning.cli.byte_search import IdSearch, is_of_no_user, texts
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.file_contents import SQLITE, UnreadContentError, contents, head_of
from prlhf_lightning.cli.model_card import is_card
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.training.user_rows import user_rows
from prlhf_lightning.utils.cache_dir import default_cache_dir
from prlhf_lightning.utils.hashing import SETTINGS
from prlhf_lightning.utils.progress import progress_bars
from prlhf_lightning.utils.terminal import listed, printable

_MB = 1 << 20
_SHOWN = 20  # options of a command


def report_other_copies(
    folders: Sequence[Path], done: Collection[Path], user_ids: Sequence[str], also: Sequence[Path] = ()
) -> None:
    """Print other files and folders that name users. Each file is read once, for any number of users.

    Args:
        folders: Folders of the changed checkpoints.
        done: The changed files, which hold no trace of the users.
        user_ids: The users.
        also: More files and folders to search.
    """
    search, near = IdSearch(user_ids), Neighbors.of(folders, also)
    written = {os.path.realpath(path) for path in done}
    files = [(root, path) for root, path in near.files if os.path.realpath(path) not in written]
    cached = [path for path in _cached() if os.path.realpath(path) not in written]
    report = _Report(user_ids)
    report.names(_named_paths(files, search, user_ids))
    with progress_bars() as progress:
        everything = [*files, *((default_cache_dir(), path) for path in cached)]
        task = progress.add_task("Searching other files, MB", total=max(1, sum(_size(p) for _, p in everything) // _MB))
        for root, path in everything:
            found = _named_in(path, search, lambda count: progress.advance(task, count / _MB))
            report.file(root, path, [user_id for user_id in user_ids if user_id in found])
    report.end()
    for folder in near.unreadable:
        print(f"{_shown(folder)} cannot be read and was not searched.")
    if near.left_out:
        print(f"Not searched: {listed([*map(str, near.left_out)])}; add folders with --also_search.")


class _Report:
    """Prints the findings and what to do about each."""

    def __init__(self, user_ids: Sequence[str]) -> None:
        self._user_ids = user_ids
        self._whole: dict[tuple[Path, str], set[str]] = {}  # folders that can only be deleted whole, and what they are
        self._is_export = cache(is_export)

    def names(self, named: dict[tuple[Path, Path], set[str]]) -> None:
        for (root, part), ids in named.items():
            if whole := self._folder_of(root, part):
                self._whole.setdefault(whole, set()).update(ids)
            else:
                print(f"{_shown(part)} has {listed(self._in_order(ids))} in its own name: see to it yourself.")

    def file(self, root: Path, path: Path, found: Sequence[str]) -> None:
        if not found:
            return
        if whole := self._folder_of(root, path):
            self._whole.setdefault(whole, set()).update(found)
        elif path.suffix == ".ckpt":
            _report_checkpoint(path, found)
        elif path.suffix == ".partial":
            print(f"{_shown(path)}, which a killed process left, names {listed(found)}: delete it.")
        elif path.is_relative_to(default_cache_dir()):
            print(f"{_shown(path)}, a copy of data that training makes again, names {listed(found)}: delete it.")
        else:
            more = " (SQLite keeps what is deleted until VACUUM)" if head_of(path).startswith(SQLITE) else ""
            print(f"{_shown(path)} names {listed(found)}, or has the letters by chance: see to it yourself{more}.")

    def end(self) -> None:
        for (folder, kind), ids in self._whole.items():
            print(f"{_shown(folder)} is {kind % listed(self._in_order(ids))}")

    def _in_order(self, ids: Collection[str]) -> list[str]:
        return [user_id for user_id in self._user_ids if user_id in ids]

    def _folder_of(self, root: Path, path: Path) -> tuple[Path, str] | None:
        for folder in (path, *path.parents):
            if not folder.is_relative_to(root) or not folder.is_dir():
                continue
            if self._is_export(folder):
                return folder, "an exported model with %s in it, vectors included: delete it, and export it again."
            if folder.suffix == ".ckpt":
                return folder, "a checkpoint that was written in shards, and names %s: delete it."
        return None


def _named_in(path: Path, search: IdSearch, progress: Callable[[float], object]) -> set[str]:
    found: set[str] = set()
    try:
        for stream in contents(path):
            found |= search.named_in(stream, progress)
    except UnreadContentError as error:
        print(f"{_shown(path)} was not searched completely: {printable(str(error))}")
    except OSError as error:
        print(f"{_shown(path)} cannot be read and was not searched: {error.strerror}")
    return found


def _named_paths(
    files: Sequence[tuple[Path, Path]], search: IdSearch, user_ids: Sequence[str]
) -> dict[tuple[Path, Path], set[str]]:
    """Return the outermost part of each path below a run's folder whose name contains user ids, with these ids."""
    named: dict[tuple[Path, Path], set[str]] = {}
    relative = [Path(root.name, path.relative_to(root)) for root, path in files]
    if not search.named_in(BytesIO(b"\n".join(map(os.fsencode, relative)))):
        return named
    for (root, _), below in zip(files, relative, strict=True):
        for user_id in search.named_in(BytesIO(os.fsencode(below))):
            own = IdSearch([user_id])
            lengths = range(1, len(below.parts) + 1)
            first = next(n for n in lengths if own.named_in(BytesIO(os.fsencode(Path(*below.parts[:n])))))
            part = root.joinpath(*below.parts[1:first]) if root.name else root.joinpath(*below.parts[:first])
            named.setdefault((root, part), set()).add(user_id)
    return named


def _report_checkpoint(path: Path, found: Sequence[str]) -> None:
    try:
        content = read_checkpoint(path, "model")
        known = user_rows(content, path).vocabulary
    except PRLHFError:
        print(f"{_shown(path)} can't be read, and names {listed(found)}: delete it.")
        return
    if still := [user_id for user_id in found if user_id in known]:
        print(f"{_shown(path)} still holds {listed(still)}:")
        if len(still) <= _SHOWN and all(map(str.isprintable, (str(path), *still))):
            options = " ".join(shlex.quote(f"--user={user_id}") for user_id in still)
        else:
            options = "--user_file FILE --skip_unknown true"  # a terminal can't show them as they are
        print(f"  prlhf-lightning users remove --model {shlex.quote(_shown(path))} {options}")
        print("  (or, for all checkpoints beside it as well, with --all true)")
    wanted = set(found).difference(still)
    if elsewhere := {text for place, text in texts(content) if text in wanted and not is_of_no_user(place)}:
        print(f"{_shown(path)} names {listed(sorted(elsewhere))} in a place not known to this tool: delete it.")


def _cached() -> Iterator[Path]:
    """Yield the cache files that may name users: tokenized data, and user counts of streams."""
    folder = default_cache_dir()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        # Log-probs of the reference and vectors of texts have digests of texts as keys.
        if path.is_file() and path.relative_to(folder).parts[0] not in ("reference", "features"):
            yield path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _shown(path: Path) -> str:
    return printable(re.sub(r"[\ud800-\udfff]", "?", str(path)))


_SIGNS = ("checkpoints", "config.yaml")  # of a run's folder
_OF_LOGGERS = frozenset(("mlruns", "mlartifacts", "wandb", "lightning_logs", "tb_logs", "tensorboard"))
_CHECKPOINTS = "checkpoints"


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported model."""
    return (folder / SETTINGS).is_file() or is_card(folder / "README.md")


@dataclass
class Neighbors:
    """The files in and near a run.

    Attributes:
        files: Each with the outermost fully searched folder around it, or itself.
        left_out: Folders that were not searched.
        unreadable: Folders that cannot be read.
    """

    files: list[tuple[Path, Path]] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _above: set[str] = field(default_factory=set)  # folders in which something was looked at

    @classmethod
    def of(cls, folders: Iterable[Path], also: Sequence[Path] = ()) -> Neighbors:
        """Find the files.

        The run of each folder is searched completely, and so are all runs, exports and logger folders next to it. In
        the folders around these, only the files directly in them are searched.

        Args:
            folders: Folders with checkpoints in them.
            also: More files and folders, which are searched completely.
        """
        found = cls()
        around: dict[Path, None] = {}
        for folder in folders:
            run = _run_of(folder)
            roots = [run] if run else []
            base = run.parent if run else folder
            roots += _beside(base)
            for root in roots:
                found._walk(root)
                around |= dict.fromkeys((base, root.parent))
            around[base] = None
        for base in around:
            found._look_at(base)
        for path in also:
            found._walk(path) if path.is_dir() else found._add(path, path)
        found.left_out = [path for path in found.left_out if not found._knows(path)]
        return found

    def _knows(self, folder: Path) -> bool:
        return (real := os.path.realpath(folder)) in self._seen or real in self._above

    def _walk(self, root: Path) -> None:
        self._above.update(map(str, Path(os.path.realpath(root)).parents))
        for place, folders, files in os.walk(root, onerror=self._unreadable):
            here = Path(place)
            if (real := os.path.realpath(here)) in self._seen:
                folders.clear()
                continue
            self._seen.add(real)
            for name in sorted(files):
                self._add(root, here / name)
            folders.sort()
            for link in (here / name for name in folders if (here / name).is_symlink()):
                if link.name == _CHECKPOINTS:
                    self._walk(link)
                else:  # it may lead to a base model, or to all data
                    self.left_out.append(link)

    def _look_at(self, base: Path) -> None:
        """Add the files of a folder, but not of its subfolders."""
        if os.path.realpath(base) in self._seen:
            return
        try:
            entries = sorted(base.iterdir())
        except OSError:
            self.unreadable.append(base)
            return
        for path in entries:
            if path.is_file():
                self._add(path, path)
            elif path.is_dir() and not self._knows(path):
                self.left_out.append(path)

    def _add(self, root: Path, path: Path) -> None:
        name = os.path.join(os.path.realpath(path.parent), path.name)
        if path.is_file() and name not in self._seen:  # and no pipe, which would wait for a writer
            self._seen.add(name)
            self.files.append((root, path))

    def _unreadable(self, error: OSError) -> None:
        self.unreadable.append(Path(str(error.filename)))


def _run_of(folder: Path) -> Path | None:
    """Return the run's folder of a folder of checkpoints, or None."""
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    if folder.name == _CHECKPOINTS:
        return folder.parent if folder.parent.name else folder.resolve().parent
    return folder if (folder / "config.yaml").is_file() or (folder / _CHECKPOINTS).is_dir() else None


def _beside(base: Path) -> Iterator[Path]:
    """Yield the runs in a folder and its subfolders, with any names, and exports and logs."""
    signs = sorted(sign for part in ("*", "*/*") for name in _SIGNS for sign in base.glob(f"{part}/{name}"))
    yield from dict.fromkeys(sign.parent for sign in signs)
    for folder in sorted(path for path in base.glob("*") if path.is_dir()):
        if folder.name in _OF_LOGGERS or is_export(folder):
            yield folder
