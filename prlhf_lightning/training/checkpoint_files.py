"""Checkpoint files: atomic writes, and a checksum that is verified before anything is loaded.

A checkpoint is the zip file that `torch.save` writes, and opens with `torch.load` alone. torch does not verify the
checksums in it, so a flipped bit would load as another weight. Our files have a checksum of their own: the zip's
comment, at the very end, holds the SHA-256 of every byte before it.
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
# A zip ends with a record of 22 bytes. Its last two hold the length of the comment that follows.
_END, _END_SIZE = b"PK\x05\x06", 22


def save(content: Any, path: Path, as_old_as: Path | None = None) -> None:
    """Write a checkpoint with its checksum, atomically: a killed process leaves the old file or the new one.

    Args:
        content: Its content.
        path: The file.
        as_old_as: A file whose modification time is copied.

    Raises:
        CheckpointWriteError: The system refused the write, such as on a full disk; the old file is unchanged.
    """
    with atomic_writer(path) as file:
        torch.save(content, file)
        append_checksum(file)
        if as_old_as is not None:
            file.flush()  # so that nothing is written after
            times = as_old_as.stat()
            os.utime(file.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))


def append_checksum(file: BinaryIO) -> None:
    """Write the digest of a zip file into its comment, which must be empty."""
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT.to_bytes(2, "little") + _MARK)
    file.write(_digest(file, file.tell()))


def check(path: Path) -> None:
    """Verify that a file is unchanged since it was written.

    A file of another program has no such checksum. For it, the checksums of the zip's members are verified.

    Raises:
        DamagedCheckpointError: The file is damaged.
    """
    with path.open("rb") as file:
        reason = _damage(file)
    if reason:
        raise DamagedCheckpointError(f"{path} is damaged, or no checkpoint: {reason}.")


def origin(path: Path) -> dict[str, str]:
    """Return the absolute `path` and the content `digest` of a checkpoint or an exported folder.

    The digest of a missing file is empty. For a file with a checksum, the checksum is returned without reading the
    rest.
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
    """Verify a checkpoint and return its content.

    Args:
        path: The file.
        map_location: Where tensors go; see `torch.load`.
        weights_only: Refuse a file that could run code.
        mmap: Memory-map the tensors.

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
    except Exception as error:  # crafted files can raise anything
        raise DamagedCheckpointError(f"{path} is damaged, or no checkpoint: {error}.") from error


def in_order(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first; a sharded checkpoint is a folder."""
    ages: dict[Path, tuple[int, str]] = {}
    for path in folder.glob("*.ckpt"):
        with suppress(FileNotFoundError):  # a live run replaces its best checkpoint
            ages[path] = _age(path)
    return sorted(ages, key=ages.__getitem__)


def newest_intact(folder: Path, besides: Path | None = None) -> Path | None:
    """Return the newest intact checkpoint of a folder; sharded checkpoints are not verified."""
    for path in in_order(folder):
        if besides is None or path.name != besides.name:
            with suppress(DamagedCheckpointError, OSError):
                if not path.is_dir():
                    check(path)
                return path
    return None


def checkpoint_of(model: Path, option: str = "model") -> Path:
    """Return the checkpoint of a trained model: the file itself, or the newest intact one of a run's folder.

    Args:
        model: A checkpoint, or a run's folder, as runs/version_0.
        option: Name of the option, for messages.

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
    # A file of ours looks like this only if its comment is cut off completely and the length set to zero.
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
