"""Contents of files as byte streams, with compressed and columnar formats decoded."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from prlhf_lightning.cli.byte_search import Stream
from prlhf_lightning.errors import PRLHFError

_HEAD = 16
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
_ARROW_CODECS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_ZIP, _PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PK\x03\x04", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_CLOSED = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x89HDF": "HDF5"}
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, ValueError)

SQLITE = b"SQLite format 3\0"
"""First bytes of a SQLite file."""


class UnreadContentError(PRLHFError):
    """A part of a file could not be read."""


class _Whole:
    """A stream that ends at the first damage, such as the truncated end of a killed writer.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.damage: Exception | None = None

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and none at the end."""
        parts: list[bytes] = []
        while size > 0 and self.damage is None:
            try:
                part = self._stream.read1(size)
            except _DAMAGE as error:
                self.damage = error
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file, which identify its format."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def contents(path: Path) -> Iterator[Stream]:
    """Yield the contents of a file.

    The first bytes decide the format, not the name. For Parquet and Arrow files, texts and names are yielded; for zip
    files, the raw bytes (which include all of a checkpoint) and each compressed member.

    Raises:
        UnreadContentError: A part could not be read; the readable parts were yielded before.
    """
    head = head_of(path)
    if kind := next((kind for magic, kind in _CLOSED.items() if head.startswith(magic)), None):
        yield from _plain(path)
        raise UnreadContentError(f"it is compressed ({kind})")
    try:
        for stream in _contents(path, head):
            yield (whole := _Whole(stream))
            if whole.damage:
                raise whole.damage
    except pa.ArrowInvalid as error:
        yield from _plain(path)  # what only looks like one
        if not head.startswith(_ARROW_STREAM):
            raise UnreadContentError(str(error)) from error
    except _DAMAGE as error:
        raise UnreadContentError(str(error) or type(error).__name__) from error


def _contents(path: Path, head: bytes) -> Iterator[Any]:
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        yield from _columns(path, head)
        return
    yield from _plain(path)
    codec = next((codec for magic, codec in _ARROW_CODECS.items() if head.startswith(magic)), None)
    if codec:
        with pa.CompressedInputStream(pa.OSFile(str(path)), codec) as stream:
            yield stream
    elif head.startswith(_GZIP):
        with gzip.open(path) as stream:
            yield stream
    elif head.startswith(_BZIP2):
        with bz2.open(path) as stream:
            yield stream
    elif head.startswith(_XZ):
        with lzma.open(path) as stream:
            yield stream
    elif head.startswith(_ZIP) and zipfile.is_zipfile(path):  # one that a killed process left is not
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    with archive.open(member) as stream:
                        yield stream


def _plain(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        yield file


def _columns(path: Path, head: bytes) -> Iterator[Stream]:
    if head.startswith(_PARQUET):
        with pq.ParquetFile(path) as parquet:
            schema, batches = parquet.schema_arrow, parquet.iter_batches()
            yield from _texts(schema, batches)
        return
    with pa.memory_map(str(path)) as source:
        if head.startswith(_ARROW_FILE):
            file = pa.ipc.open_file(source)
            schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
        else:
            schema, batches = (stream := pa.ipc.open_stream(source)).schema, iter(stream)
        yield from _texts(schema, batches)


def _texts(schema: Any, batches: Iterator[Any]) -> Iterator[Stream]:
    about = [str(name).encode() for name in schema.names]
    about += [part for pair in (schema.metadata or {}).items() for part in pair]
    yield io.BytesIO(b"\n".join(about))
    for batch in batches:
        for column in batch.columns:
            for texts in _text_arrays(column):
                lines = (
                    text if isinstance(text, bytes) else text.encode() for text in texts.unique().to_pylist() if text
                )
                yield io.BytesIO(b"\n".join(lines))


def _text_arrays(array: Any) -> Iterator[Any]:
    """Yield the arrays of texts that an array, of any type, holds."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _text_arrays(array.dictionary)
    elif pa.types.is_struct(kind):
        for part in array.flatten():
            yield from _text_arrays(part)
    elif pa.types.is_map(kind):
        yield from _text_arrays(array.keys)
        yield from _text_arrays(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _text_arrays(array.flatten())
    elif any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        yield array
    elif pa.types.is_integer(kind):  # ids may be numbers in a table of people's own
        yield array.cast(pa.string())
