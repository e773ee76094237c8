"""Files that are written whole or not at all, whatever is killed and whatever the disk refuses."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copymode
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, TextIO
from uuid import uuid4

from prlhf_lightning.errors import CheckpointWriteError, PRLHFError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Do as `atomically`, for files that people ask for: the error says what has become of the file and what to do.

    Raises:
        CheckpointWriteError: The system refused a write.
    """
    path = _target(path)
    try:
        with atomically(path) as file:
            yield file
    except PRLHFError:  # says already what is wrong, for instance with what was read meanwhile
        raise
    except Exception as error:
        cause = _refusal(error)
        if cause is None:
            raise
        kept = "What was there before is untouched." if path.exists() else "Nothing is left of it."
        raise CheckpointWriteError(
            f"{path} could not be written: {cause.strerror or cause}. {kept} Make room, or choose another folder."
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def atomically(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, complete and on the disk.

    Where the block or the disk fails, `path` is what it was before.

    Args:
        path: The file. Its folder is made where there is none; a link goes on pointing at what it points at.
        shared: Whether several processes may write it at once. The last one counts.

    Raises:
        OSError: The system refused a write.
    """
    path = _target(path)
    partial = partial_of(path.with_name(f"{path.name}.{uuid4().hex}") if shared else path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w+b", buffering=1 << 20) as file:
            yield file
            sync(file)
        with suppress(OSError):  # what was its owner's alone stays so, where there was a file
            copymode(path, partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def as_text(file: BinaryIO) -> Iterator[TextIO]:
    """Have a file take text, as UTF-8 with its line ends as they are, while the block lasts."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
    finally:
        text.detach()


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, and see, before anything is computed, that files can be written to it.

    Raises:
        OSError: They can't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def partial_of(path: Path) -> Path:
    """Return the name under which a file is written before it is complete; a killed process may leave it behind."""
    return path.with_name(f".{path.name}.partial")


def sync(file: IO[Any]) -> None:
    """See that what was written is on the disk, as before a rename to what later starts trust."""
    file.flush()
    os.fsync(file.fileno())


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    """Have a new name in a folder outlast a loss of power."""
    with suppress(OSError):  # some file systems can't
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refusal(error: BaseException | None) -> OSError | None:
    """Return the system's error behind one of torch's, which wraps it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
