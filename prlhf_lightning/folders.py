"""Folders that are written whole or not at all, as files are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prlhf_lightning.errors import CheckpointWriteError
from prlhf_lightning.files import naming, partial_of, sync, sync_folder

#: What stands in a folder while another takes its place: the new one, and what it replaces.
UNFINISHED = (".partial", ".replaced")


@contextmanager
def whole_folder(folder: Path, replaced: Iterable[str], last: str) -> Iterator[Path]:
    """Give a folder to write to, that becomes `folder` when the block ends and all of it is on the disk.

    Where there is a folder already, which may be a volume of its own, its files are replaced by renaming them one by
    one. An error, also one of these, leaves all that was there. A process that is killed between them, which is a
    matter of milliseconds, leaves a folder without the file `last`.

    Args:
        folder: Where the files go.
        replaced: Patterns of the files of an earlier writing, which go also where none of the same name comes.
        last: Name of the file that says that all others are there.

    Raises:
        CheckpointWriteError: The system refused something; what was there is untouched.
    """
    target = Path(os.path.realpath(folder))
    is_new = not target.exists()
    staging = partial_of(target) if is_new else target / UNFINISHED[0]
    try:
        with naming(folder), not_left_empty(target.parent), _removed(staging):
            staging.mkdir(parents=True)
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        sync(file)
            if is_new:
                os.rename(staging, target)
            else:
                _swap(staging, target, list(replaced), last)
            sync_folder(target.parent if is_new else target)
    except CheckpointWriteError as error:
        raise CheckpointWriteError(str(error).replace(str(staging), str(folder))) from error


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Have a folder gone before the block, as one of a process that was killed, and after it."""
    _remove(folder)
    try:
        yield
    finally:
        _remove(folder)


@contextmanager
def not_left_empty(folder: Path) -> Iterator[None]:
    """Remove a folder, and those above it, that the block has made and left empty by an error."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        for one in made:
            with suppress(OSError):
                one.rmdir()
        raise


def _swap(staging: Path, target: Path, patterns: list[str], last: str) -> None:
    new = sorted(staging.iterdir(), key=lambda path: path.name == last)
    names = {path.name for path in new}
    gone = {path for pattern in patterns for path in target.glob(pattern)}
    gone |= {path for path in target.iterdir() if path.name in names}
    old = target / UNFINISHED[1]
    _remove(old)
    old.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for path in sorted(gone, key=lambda path: path.name != last):
            os.rename(path, old / path.name)
            done.append((path, old / path.name))
        for path in new:
            os.rename(path, target / path.name)
            done.append((path, target / path.name))
    except BaseException:
        for before, after in reversed(done):
            os.rename(after, before)
        raise
    finally:
        _remove(old)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
