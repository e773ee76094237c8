"""Files that are written whole or not at all, whatever is killed and whatever the disk refuses."""

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

# How a formula begins in a spreadsheet, and what `escape_cell` puts before one.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Do as `atomic_file`, for files that people ask for: the error says what has become of the file and what to do.

    Only what is the file's own fault is put down to it: what else goes wrong in the block, such as reading something
    else, is raised as it is.

    Raises:
        CheckpointWriteError: The system refused a write, or there is something at `path` that is no file.
    """
    path = _target(path)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device, or the like"
        raise CheckpointWriteError(f"{path} is {kind}, and no file that can be written; give the name of a file.")
    file: BinaryIO | None = None
    of_block: Exception | None = None
    try:
        with atomic_file(path) as file:
            try:
                yield file
            except Exception as error:
                of_block = error
                raise
    except PRLHFError:  # says already what is wrong, for instance with what was read meanwhile
        raise
    except Exception as error:
        cause = _refusal_of(file) if error is of_block else error
        if not isinstance(cause, OSError):
            raise
        raise CheckpointWriteError(_what_is_wrong(path, cause, begun=file is not None)) from error


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `atomic_writer` does."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files as `atomic_writer` does, all of them or none."""
    with all_or_none(contents), ExitStack() as stack:
        files = [(stack.enter_context(atomic_writer(path)), content) for path, content in contents.items()]
        for file, content in files:
            file.write(content)
            flush_to_disk(file)


@contextmanager
def all_or_none(paths: Iterable[Path]) -> Iterator[None]:
    """Put files back as they were before the block, where it fails when some of them have been replaced."""
    targets = [_target(path) for path in paths]
    kept = {path: path.with_name(f".{path.name}.kept") for path in targets if path.exists()}
    try:
        for path, link in kept.items():
            with suppress(OSError):  # a file system may know no links
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
    """Add to the end of a file, all or nothing; a new file is its owner's alone.

    Raises:
        CheckpointWriteError: The system refused it; the file is what it was before.
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
    """Raise what the system refuses in the block as an error that names a file, or the folder that is written to.

    For what other libraries write, that leave out the name, or raise errors of their own.

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
        raise CheckpointWriteError(_what_is_wrong(path, cause, begun=False)) from error


def system_error(error: BaseException) -> OSError | None:
    """Return the system's error behind one of a library; those written in Rust only quote it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(quoted[1]), os.strerror(int(quoted[1]))) if quoted else None


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, complete and on the disk.

    A new file can be read by its owner only, since most of what is written names people. Where the block or the disk
    fails, `path` is what it was before.

    Args:
        path: The file. Its folder is made where there is none; a link goes on pointing at what it points at.
        shared: Whether several processes may write it at once. The last one counts.

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
        with suppress(OSError):  # whoever could read a file that was there can read the new one
            copymode(path, partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Bring a file that was written under another name to the disk, and give it its own.

    Raises:
        OSError: The system refused it.
    """
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


@contextmanager
def text_writer(file: BinaryIO) -> Iterator[TextIO]:
    """Have a file take text, as UTF-8 with its line ends as they are, while the block lasts."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
    finally:
        text.detach()


def escape_cell(text: str) -> str:
    """Return a text for a cell of a CSV file that a spreadsheet must not take for a formula: with ' before it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def unescape_cell(cell: str) -> str:
    """Return the text that `escape_cell` wrote."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, and see, before anything is computed, that files can be written to it.

    Raises:
        OSError: They can't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def check_output(path: Path, option: str) -> None:
    """See, before anything is computed, that a file can be written.

    Args:
        path: The file.
        option: What the user called it, for messages.

    Raises:
        ConfigurationError: It can't.
    """
    target = _target(path)
    if os.path.isdir(target):
        raise ConfigurationError(f"{option}: {path} is a folder; name a file.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigurationError(f"{option}: {path} is a device, or the like; name a file.")
    try:
        with suppress(FileNotFoundError):  # a name may be too long
            os.lstat(partial_path(target))
        check_writable(target.parent)
    except OSError as error:
        reason = _in_the_way(target.parent) or error.strerror
        raise ConfigurationError(f"{option}: {path} cannot be written ({reason}); name another file.") from error


def check_output_folder(folder: Path, option: str) -> None:
    """Check, before anything is computed, that files can be written to a folder, which is made if it is not there.

    Args:
        folder: The folder.
        option: What the user called it, for messages.

    Raises:
        ConfigurationError: They can't.
    """
    target = _target(folder)
    if os.path.exists(target) and not os.path.isdir(target):
        raise ConfigurationError(f"{option}: {folder} is a file; name a folder.")
    try:
        with suppress(FileNotFoundError):  # a name may be too long
            os.lstat(partial_path(target))
        check_writable(target)
    except OSError as error:
        reason = _in_the_way(target) or error.strerror
        raise ConfigurationError(f"{option}: {folder} cannot be written to ({reason}); name another folder.") from error


def _in_the_way(folder: Path) -> str | None:
    """Return that a file is in the place of a folder or of one above it, or None."""
    found = next((one for one in (folder, *folder.parents) if os.path.isfile(one)), None)
    return f"{found} is a file, and no folder" if found else None


def partial_path(path: Path) -> Path:
    """Return the name under which a file is written before it is complete; a killed process may leave it behind."""
    return path.with_name(f".{path.name}.partial")


def flush_to_disk(file: IO[Any]) -> None:
    """See that what was written is on the disk, as before a rename to what later starts trust."""
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
    """Have a new name in a folder outlast a loss of power."""
    with suppress(OSError):  # some file systems can't
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Output(io.FileIO):
    """A file that knows why the system refused a write: torch, for one, raises an error of its own."""

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


def _what_is_wrong(path: Path, error: OSError, begun: bool) -> str:
    """Return why a file could not be written, what has become of it, and what to do."""
    kept = "Nothing is left of it. " if begun else ""
    if os.path.lexists(path):
        kept = "What was there before is untouched. "
    why, advice = error.strerror or str(error), "Choose another folder."
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            advice = "Make room, or choose another folder."
        case errno.EFBIG:
            advice = "Choose a folder where files may be as large (see `ulimit -f` too)."
        case errno.EACCES | errno.EPERM:
            why = f"there is no permission to write to the folder {path.parent} ({why})"
            advice = "Have it given, or choose another folder."
        case errno.EROFS:
            advice = "Choose a folder that can be written to."
        case errno.ENAMETOOLONG:
            advice = "Choose a shorter name."
        case errno.EEXIST | errno.ENOTDIR:
            in_the_way = next((folder for folder in path.parents if os.path.isfile(folder)), path.parent)
            why = f"{in_the_way} is a file, and no folder"
    return f"{path} could not be written: {why}. {kept}{advice}"


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
