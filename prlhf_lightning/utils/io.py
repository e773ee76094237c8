"""Atomic writing of files and folders: complete or unchanged, also after a crash or a full disk."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import copymode
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TextIO
from uuid import uuid4

from prlhf_lightning.errors import CheckpointWriteError, ConfigurationError, PRLHFError

# First characters of a formula in a spreadsheet, and the ' that `escape_cell` adds.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a file like `atomic_file`, with errors for users: they say why, whether the old file is kept, and the fix.

    Only failures to write this file become such errors. Other errors of the block, such as a failure to read another
    file, are raised unchanged.

    Raises:
        CheckpointWriteError: The system refused a write, or `path` is not a file.
    """
    path = _target(path)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or another special file"
        raise CheckpointWriteError(f"{path} is {kind}, not a regular file; give the name of a file.")
    file: BinaryIO | None = None
    of_block: Exception | None = None
    try:
        with atomic_file(path) as file:
            try:
                yield file
            except Exception as error:
                of_block = error
                raise
    except PRLHFError:  # already a clear message, for instance about a file that the block reads
        raise
    except Exception as error:
        cause = _refusal_of(file) if error is of_block else error
        if not isinstance(cause, OSError):
            raise
        raise CheckpointWriteError(_write_error_message(path, cause, begun=file is not None)) from error


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file with `atomic_writer`."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files with `atomic_writer`, all or none."""
    with all_or_none(contents), ExitStack() as stack:
        files = [(stack.enter_context(atomic_writer(path)), content) for path, content in contents.items()]
        for file, content in files:
            file.write(content)
            flush_to_disk(file)


@contextmanager
def all_or_none(paths: Iterable[Path]) -> Iterator[None]:
    """Restore files to their state before the block if the block fails after replacing some of them."""
    targets = [_target(path) for path in paths]
    kept = {path: path.with_name(f".{path.name}.kept") for path in targets if path.exists()}
    try:
        for path, link in kept.items():
            with suppress(OSError):  # some file systems have no hard links
                link.unlink(missing_ok=True)
                os.link(path, link)
        yield
    except BaseException:
        for path in targets:
            with suppress(OSError):
                os.replace(kept[path], path) if path in kept else path.unlink(missing_ok=True)
        raise
    finally:
        for link in kept.values():
            with suppress(OSError):
                link.unlink(missing_ok=True)


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file, all or nothing; a new file is readable only by its owner.

    Raises:
        CheckpointWriteError: The system refused the write; the file is unchanged.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            before = os.fstat(handle).st_size
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(handle, left) :]
            except BaseException:
                os.ftruncate(handle, before)
                if not before:
                    path.unlink(missing_ok=True)
                raise
        finally:
            os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn system errors of the block into errors that name the file or folder being written.

    For files written by other libraries, which omit the name or raise their own errors.

    Raises:
        CheckpointWriteError: The system refused a write.
    """
    try:
        yield
    except PRLHFError:
        raise
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        raise CheckpointWriteError(_write_error_message(path, cause, begun=False)) from error


def system_error(error: BaseException) -> OSError | None:
    """Return the system error behind a library's error; None if there is none. Rust libraries only quote it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(quoted[1]), os.strerror(int(quoted[1]))) if quoted else None


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends, complete and flushed to disk.

    A new file is readable only by its owner, because most files contain user ids. If the block or the disk fails,
    `path` is unchanged.

    Args:
        path: The file. Its folder is created if needed; a symbolic link is followed and kept.
        shared: Whether several processes may write it at the same time; the last one wins.

    Raises:
        OSError: The system refused a write.
    """
    path = _target(path)
    partial = partial_path(path.with_name(f"{path.name}.{uuid4().hex}") if shared else path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with io.BufferedRandom(_Output(partial, "w+b", opener=_open_private), buffer_size=1 << 20) as file:
            yield file
            flush_to_disk(file)
        with suppress(OSError):  # keep the permissions of the replaced file
            copymode(path, partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a file with a temporary name to disk and rename it to `path`.

    Raises:
        OSError: The system refused it.
    """
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


@contextmanager
def text_writer(file: BinaryIO) -> Iterator[TextIO]:
    """Wrap a binary file for text within the block, as UTF-8 with unchanged line ends."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
    finally:
        text.detach()


def escape_cell(text: str) -> str:
    """Return a text for a CSV cell, with a leading ' if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def unescape_cell(cell: str) -> str:
    """Undo `escape_cell`."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def check_writable(folder: Path) -> None:
    """Create a folder if needed, and check that files can be written to it.

    Raises:
        OSError: The folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def check_output(path: Path, option: str) -> None:
    """Check, before any computation, that a file can be written.

    Args:
        path: The file.
        option: Name of the user's option, for messages.

    Raises:
        ConfigurationError: It cannot be written.
    """
    target = _target(path)
    if os.path.isdir(target):
        raise ConfigurationError(f"{option}: {path} is a folder; give a file.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigurationError(f"{option}: {path} is a device or another special file; give a regular file.")
    if reason := _why_not_writable(target, target.parent):
        raise ConfigurationError(f"{option}: {path} cannot be written ({reason}); give another file.")


def check_output_folder(folder: Path, option: str) -> None:
    """Check, before any computation, that a folder is writable; create it if needed.

    Args:
        folder: The folder.
        option: Name of the user's option, for messages.

    Raises:
        ConfigurationError: It is not writable.
    """
    target = _target(folder)
    if os.path.exists(target) and not os.path.isdir(target):
        raise ConfigurationError(f"{option}: {folder} is a file; give a folder.")
    if reason := _why_not_writable(target, target):
        raise ConfigurationError(f"{option}: {folder} cannot be written to ({reason}); give another folder.")


def _why_not_writable(target: Path, folder: Path) -> str | None:
    """Return why a target, in or equal to a folder that is created if needed, cannot be written; otherwise None."""
    try:
        with suppress(FileNotFoundError):  # a name may be too long
            os.lstat(partial_path(target))
        check_writable(folder)
    except OSError as error:
        return _blocking_file(folder) or error.strerror or str(error)
    return None


def _blocking_file(folder: Path) -> str | None:
    """Return a reason if a file has the name of the folder or of a parent folder; otherwise None."""
    found = next((one for one in (folder, *folder.parents) if os.path.isfile(one)), None)
    return f"{found} is a file, not a folder" if found else None


def partial_path(path: Path) -> Path:
    """Return the name of a file while it is incomplete; a killed process may leave such a file."""
    return path.with_name(f".{path.name}.partial")


def flush_to_disk(file: IO[Any]) -> None:
    """Flush a file to disk, as is needed before a rename."""
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        if isinstance(raw := getattr(file, "raw", None), _Output):
            raw.refusal = error
        raise


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so a new name in it survives a power loss."""
    with suppress(OSError):  # some file systems do not support it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Output(io.FileIO):
    """A file that remembers why the system refused a write; libraries such as torch raise their own errors."""

    refusal: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refusal = error
            raise


def _refusal_of(file: BinaryIO | None) -> OSError | None:
    raw = getattr(file, "raw", None)
    return raw.refusal if isinstance(raw, _Output) else None


def _write_error_message(path: Path, error: OSError, begun: bool) -> str:
    """Return a message: why a file could not be written, whether an old one is kept, and the fix."""
    kept = "The partial file was removed. " if begun else ""
    if os.path.lexists(path):
        kept = "The old version is unchanged. "
    why, advice = error.strerror or str(error), "Choose another folder."
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            advice = "Free space, or choose another folder."
        case errno.EFBIG:
            advice = "Choose a folder that allows files of this size (see also `ulimit -f`)."
        case errno.EACCES | errno.EPERM:
            why = f"there is no permission to write to the folder {path.parent} ({why})"
            advice = "Get permission, or choose another folder."
        case errno.EROFS:
            advice = "Choose a writable folder."
        case errno.ENAMETOOLONG:
            advice = "Choose a shorter name."
        case errno.EEXIST | errno.ENOTDIR:
            blocking = next((folder for folder in path.parents if os.path.isfile(folder)), path.parent)
            why = f"{blocking} is a file, not a folder"
    return f"{path} could not be written: {why}. {kept}{advice}"


#: Names of subfolders during a replacement: the new files, and the replaced ones.
UNFINISHED = (".partial", ".replaced")


@contextmanager
def whole_folder(folder: Path, replaced: Iterable[str], last: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends, complete and flushed to disk.

    If `folder` exists (it may be a mounted volume), its files are replaced one by one by renames. An error, also in a
    rename, restores the old files. A process killed during the renames, which take milliseconds, leaves a folder
    without the file `last`.

    Args:
        folder: The target folder.
        replaced: Patterns of old files to remove, even if there is no new file of the same name.
        last: Name of the file whose presence means that all others are there.

    Raises:
        CheckpointWriteError: The system refused an operation; the old files are unchanged.
    """
    target = Path(os.path.realpath(folder))
    is_new = not target.exists()
    staging = partial_path(target) if is_new else target / UNFINISHED[0]
    try:
        with naming(folder), not_left_empty(target.parent), _removed(staging):
            staging.mkdir(parents=True)
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        flush_to_disk(file)
            if is_new:
                os.rename(staging, target)
            else:
                _swap(staging, target, list(replaced), last)
            sync_folder(target.parent if is_new else target)
    except CheckpointWriteError as error:
        raise CheckpointWriteError(str(error).replace(str(staging), str(folder))) from error


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Remove a folder before the block (a killed process may have left it) and after the block."""
    _remove(folder)
    try:
        yield
    finally:
        _remove(folder)


@contextmanager
def not_left_empty(folder: Path) -> Iterator[None]:
    """On an error, remove the folder and its parents if the block has created them and left them empty."""
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
