"""Checkpoint files: written whole or not at all, and checked, byte for byte, before anything in them is believed.

A checkpoint is the zip file that `torch.save` writes, and opens with `torch.load` alone. torch does not look at the
checksums in it, so that a flipped bit would load as another weight. Ours have a *seal*: the zip's comment, which stands
at the very end and holds the SHA-256 of every byte before it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.utils.io import atomic_writer

_MARK = b"prlhf_lightning sha256 "
_DIGEST = 64  # hexadecimal digits
_COMMENT = len(_MARK) + _DIGEST
# A zip ends with a record of 22 bytes, the last two of which say how long the comment after it is.
_END, _END_SIZE = b"PK\x05\x06", 22


def save(content: Any, path: Path, as_old_as: Path | None = None) -> None:
    """Write a checkpoint, sealed, in one step: a process that is killed leaves the old file or the new one.

    Args:
        content: What it holds.
        path: The file.
        as_old_as: A file whose times it gets.

    Raises:
        CheckpointWriteError: The disk is full, or the like; the file is what it was before.
    """
    with atomic_writer(path) as file:
        torch.save(content, file)
        append_checksum(file)
        if as_old_as is not None:
            file.flush()  # so that nothing is written after
            times = as_old_as.stat()
            os.utime(file.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))


def append_checksum(file: BinaryIO) -> None:
    """Write the digest of a zip file, that has no comment yet, into its comment."""
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT.to_bytes(2, "little") + _MARK)
    file.write(_digest(file, file.tell()))


def check(path: Path) -> None:
    """See that a file is what was written.

    A file without a seal, of another program's making, is checked by what every zip file has: a checksum of each of its
    members.

    Raises:
        DamagedCheckpointError: It is not.
    """
    with path.open("rb") as file:
        reason = _damage(file)
    if reason:
        raise DamagedCheckpointError(f"{path} is damaged, or no checkpoint: {reason}.")


def origin(path: Path) -> dict[str, str]:
    """Return what tells a checkpoint, or a folder that `export` wrote: its whole `path`, and its content's `digest`.

    The digest of what is not there is empty. That of a sealed file is taken from its seal, without reading the rest.
    """
    file, digest = path / "prlhf.json" if path.is_dir() else path, ""
    if file.is_file():
        with file.open("rb") as stream:
            stream.seek(-min(file.stat().st_size, _COMMENT), os.SEEK_END)
            tail = stream.read()
            is_sealed = tail.startswith(_MARK) and len(tail) == _COMMENT
            digest = tail[-_DIGEST:].decode() if is_sealed else _digest(stream, file.stat().st_size).decode()
    return {"path": str(path.absolute()), "digest": digest}


def load(path: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False) -> Any:
    """Return what a checkpoint holds, once it is known to be whole.

    Args:
        path: The file.
        map_location: Where tensors go; see `torch.load`.
        weights_only: Refuse a file that could run code.
        mmap: Leave tensors on the disk until they are used.

    Raises:
        DamagedCheckpointError: The file is damaged, holds code, or is no checkpoint. The message names the newest
            intact checkpoint beside it.
    """
    try:
        check(path)
        return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except DamagedCheckpointError as error:
        other = newest_intact(path.parent, besides=path)
        beside = f"The newest intact checkpoint beside it is {other}" if other else "There is no intact one beside it"
        raise DamagedCheckpointError(f"{error} {beside}.") from error
    except OSError:
        raise
    except UnpicklingError as error:
        raise DamagedCheckpointError(
            f"{path} holds more than weights and settings, which could run code. If you trust its source, load it in "
            f"Python, with `weights_only=False`. Cause: {error}"
        ) from error
    except Exception as error:  # what was made to be misread fails in any way at all
        raise DamagedCheckpointError(f"{path} is damaged, or no checkpoint: {error}.") from error


def in_order(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first; one may be a folder itself, written in shards."""
    ages: dict[Path, tuple[int, str]] = {}
    for path in folder.glob("*.ckpt"):
        with suppress(FileNotFoundError):  # a run that is still going replaces its best
            ages[path] = _age(path)
    return sorted(ages, key=ages.__getitem__)


def newest_intact(folder: Path, besides: Path | None = None) -> Path | None:
    """Return the newest checkpoint of a folder that is whole; of one written in shards that is not asked."""
    for path in in_order(folder):
        if besides is None or path.name != besides.name:
            with suppress(DamagedCheckpointError, OSError):
                if not path.is_dir():
                    check(path)
                return path
    return None


def checkpoint_of(model: Path, option: str = "model") -> Path:
    """Return the checkpoint that a trained model is in: the file itself, or the newest of a run's folder.

    Args:
        model: A checkpoint, or a run's folder, as runs/version_0.
        option: What the user called it, for messages.

    Raises:
        ConfigurationError: The folder holds no checkpoint that is intact, or is an exported model.
    """
    if (model / "prlhf.json").is_file():
        raise ConfigurationError(
            f"{option}: {model} is a folder that `export` wrote; this needs the checkpoint, or the folder of its run."
        )
    if not (model / "checkpoints").is_dir():
        return model
    newest = newest_intact(model / "checkpoints")
    if newest is None:
        raise ConfigurationError(f"{option}: no checkpoint in {model / 'checkpoints'} is intact; name another.")
    sys.stderr.write(f"The newest checkpoint of {model} is used: {newest}\n")
    return newest


def _age(path: Path) -> tuple[int, str]:
    return -path.stat().st_mtime_ns, path.name


def _damage(file: BinaryIO) -> str | None:
    """Return what is wrong with a file, or None."""
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(size, _END_SIZE + _COMMENT), os.SEEK_END)
    tail = file.read()
    if tail[:4] == _END and tail[20:22] == _COMMENT.to_bytes(2, "little") and tail[22:].startswith(_MARK):
        is_whole = _digest(file, size - _DIGEST) == tail[-_DIGEST:]
        return None if is_whole else "its content is not that which its checksum was made of"
    # Nothing that was sealed comes to look like this but by a comment cut off whole and its length set to zero.
    if tail[-_END_SIZE:][:4] == _END and tail[-2:] == b"\0\0":
        try:
            file.seek(0)
            wrong = zipfile.ZipFile(file).testzip()
        except Exception as error:  # a damaged zip fails in many ways
            return f"it can't be read as a zip file ({error})"
        return f"the checksum of its part {wrong} is wrong" if wrong else None
    return "its end is missing" if size else "it is empty"


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first bytes of a file, in hexadecimal."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        block = file.read(min(size, 1 << 20))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()
