"""On-disk cache of the reference policy's log-probs of completions, so that each is computed once.

They depend only on the texts and the reference, never on the user. So one cache serves all users who judged the same
texts, both terms of P-DPO (arXiv:2402.05133), evaluation, and later runs.

A cache is a folder named by a digest of the reference's identity. It holds segments that are written once, under
another name, and renamed when complete. So readers see complete segments only, for any number of writers, killed or
not. A segment is a safetensors file of two tensors, `index` (key, start, length and checksum of each
row, sorted by key) and `values` (float32). Both are mapped; only the keys are held in memory, at 24 bytes a row.
Deleting the folder is always safe.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias
from uuid import uuid4
from zlib import crc32

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.io import atomic_file

Identity: TypeAlias = Mapping[str, str | int | float | bool | None]

_FORMAT = 1  # increase it when the meaning of stored values changes, so that older caches are not read
_FLUSH_BYTES = 8 << 20
_FLUSH_SECONDS = 60  # a slow policy takes hours to fill the buffer, which a kill would lose
_SMALL_BYTES = 64 << 20  # larger segments are never rewritten, which bounds the work of a compaction
_MOST_SMALL = 64
_KEEP_SECONDS = 7 * 24 * 3600


class ReferenceCache:
    """An append-only on-disk store of the log-probs of completions, with keys from the content of their texts.

    Any number of processes may read and write the same cache. Each sees its own rows at once, and others' rows when it
    opens, refreshes or flushes. An instance belongs to one thread.

    Rows that fail their checksum, and truncated or unreadable files, are skipped with a warning that names the file; to
    the caller these rows are missing. If rows cannot be written (a full disk), they are dropped with a warning:
    training continues, and computes them again when needed. The next flush tries again.

    Args:
        folder: Folder of the caches of all references.
        identity: Everything else that the log-probs depend on: weights, dtype, tokenizer, template, truncation. Any
            change opens another cache. It is written to `identity.json`, for people to read.
        name: What this cache is, for messages.
    """

    def __init__(self, folder: str | Path, identity: Identity, name: str = "reference cache") -> None:
        self._name = name
        self._identity = json.dumps({"format": _FORMAT, "identity": dict(identity)}, indent=2, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(self._identity.encode()).hexdigest()[:32]
        self._pending: dict[bytes, Values] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._damaged: set[Path] = set()
        self._compacts = True
        self._has_warned = False
        self._lookup = Lookup([])
        try:
            self._prepare_folder()
        except OSError as error:
            raise ConfigurationError(
                f"Cannot create the {name} in {self.folder}: {error}. Set a writable folder (the variable PRLHF_CACHE)."
            ) from error
        self._sweep()
        self.refresh()

    def __len__(self) -> int:
        return len(self._lookup.keys) + self._lookup.find(list(self._pending)).count(-1)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or self._lookup.find([key]) != [-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> list[Values | None]:
        """Return the log-probs of each key, read-only `[length]` float32, or None if the key is missing."""
        found: list[Values | None] = [self._pending.get(key) for key in keys]
        missing = [place for place, values in enumerate(found) if values is None]
        rows = self._lookup.find([keys[place] for place in missing])
        for place, row in zip(missing, rows, strict=True):
            if row >= 0:
                found[place] = self._read(row)
        return found

    def put(self, keys: Sequence[bytes], values: Sequence[npt.NDArray[Any]]) -> None:
        """Store the log-probs `[length]` of each key.

        They are written every 8 MB or every minute, so a killed process loses at most that. A stored key may be put
        again; the later values replace the earlier ones.
        """
        for key, given in zip(keys, values, strict=True):
            row = np.array(given, dtype=np.float32)  # a copy: the caller may use its block again
            row.flags.writeable = False
            self._pending[key] = row
            self._pending_bytes += row.nbytes + ENTRY.itemsize
        if self._pending_bytes >= _FLUSH_BYTES or time.monotonic() - self._last_flush >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write buffered rows, and read what other processes have written."""
        if self._pending:
            keys = sorted(self._pending)
            rows = [self._pending[key] for key in keys]
            described = [(key, 0, row.size, crc32(row.data)) for key, row in zip(keys, rows, strict=True)]
            try:
                self._prepare_folder()
                write_segment(self.folder, np.array(described, ENTRY), rows)
            except OSError as error:
                message = (
                    f"New rows of the {self._name} could not be stored in {self.folder}: {error}. Stored rows are not "
                    "affected. Training continues and computes the others again when needed; to store them, "
                    "free space there or name another folder."
                )
                if not self._has_warned:
                    warnings.warn(message, stacklevel=2)
                self._has_warned = True
            self._pending, self._pending_bytes = {}, 0
        self._last_flush = time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have written since the last call."""
        segments = self._scan()
        if self._compacts and len(_small(segments)) > _MOST_SMALL:
            self._compact()
            segments = self._scan()
        if segments != self._lookup.segments:
            self._lookup = Lookup(segments)

    def close(self) -> None:
        """Write buffered rows and close the files; returned arrays stay valid."""
        self.flush()
        self._lookup = Lookup([])

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if not path.exists():
            with atomic_file(path, shared=True) as file:
                file.write(self._identity.encode() + b"\n")

    def _read(self, row: int) -> Values | None:
        segment, start, length, checksum = self._lookup.locate(row)
        values = segment.values[start : start + length]
        if crc32(values.data) == checksum:
            return values
        self._warn_damaged(segment.path, "rows do not match their checksums; they are computed again")
        return None

    def _scan(self) -> list[Segment]:
        """Map the segments on disk, newest first, so that a rewritten row replaces a damaged one."""
        mapped = {segment.path: segment for segment in self._lookup.segments}
        for _ in range(20):
            listed = sorted(self.folder.glob("*.safetensors"), reverse=True)
            with suppress(FileNotFoundError):  # another process compacted after the listing
                for path in listed:
                    if path not in mapped and path not in self._damaged:
                        try:
                            mapped[path] = Segment.open(path)
                        except ValueError as error:
                            self._warn_damaged(path, f"{error}; it is skipped and its rows are computed again")
                break
        return [mapped[path] for path in listed if path in mapped]

    def _compact(self) -> None:
        """Merge the small segments into one."""
        try:
            with FileLock(self.folder / "compaction.lock", timeout=0):
                small = _small(self._scan())
                if len(small) > _MOST_SMALL:  # otherwise another process has just compacted
                    self._merge(small)
        except Timeout:
            pass  # another process is compacting
        except (OSError, NotImplementedError):
            # A full disk, or missing permissions: leave it to another process.
            self._compacts = False

    def _merge(self, small: list[Segment]) -> None:
        superseded = self.folder / "superseded"
        superseded.mkdir(exist_ok=True)
        merged = Lookup(small)
        entries = np.concatenate([segment.entries for segment in small])[merged.rows]
        places = (merged.locate(row) for row in merged.rows.tolist())
        write_segment(self.folder, entries, (s.values[start : start + length] for s, start, length, _ in places))
        # Renamed, not deleted: on a network file system, a process on another machine that still maps a deleted file
        # would be killed when it reads a page of it.
        for segment in small:
            segment.path.replace(superseded / segment.path.name)

    def _sweep(self) -> None:
        """Delete old files of compactions and of killed writers that no process can still use."""
        for path in [*self.folder.glob(".*.partial"), *self.folder.glob("superseded/*.safetensors")]:
            with suppress(OSError):  # another process was faster, or the folder is read-only
                if time.time() - path.stat().st_ctime > _KEEP_SECONDS:
                    path.unlink()

    def _warn_damaged(self, path: Path, what: str) -> None:
        if path not in self._damaged:
            self._damaged.add(path)
            warnings.warn(f"Damaged file in the {self._name}, {path}: {what}. It is safe to delete.", stacklevel=3)


def _small(segments: Iterable[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.values.nbytes < _SMALL_BYTES]


Values: TypeAlias = npt.NDArray[np.float32]
Entries: TypeAlias = npt.NDArray[np.void]

ENTRY = np.dtype([("key", "S16"), ("start", "<i8"), ("length", "<i4"), ("checksum", "<u4")])
"""A row of an index."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment on disk.

    Attributes:
        entries: `[N]` key, start, length and checksum of each row, sorted by key.
        values: `[sum of lengths]` the rows end to end.
    """

    path: Path
    entries: Entries
    values: Values

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Map a segment and verify its index; rows are verified when they are read.

        Raises:
            ValueError: It is damaged, or belongs to another cache (earlier versions did not store that).
        """
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:begin])
            middle, end = (begin + int(header[name]["data_offsets"][1]) for name in ("index", "values"))
            if end != len(data):
                raise ValueError(f"it has {len(data)} bytes instead of {end}")
            cache = header["__metadata__"].get("cache", path.parent.name)
            if cache != path.parent.name:
                raise ValueError(f"it belongs to the cache {cache}")
            entries = np.frombuffer(data, ENTRY, (middle - begin) // ENTRY.itemsize, begin)
            if crc32(entries.view(np.uint8).data) != int(header["__metadata__"]["index_crc32"]):
                raise ValueError("its index does not match its checksum")
            return cls(path, entries, np.frombuffer(data, "<f4", (end - middle) // 4, middle))
        except FileNotFoundError:
            raise
        except (OSError, LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"it cannot be read ({error})") from error


class Lookup:
    """Finds keys in several segments; for rows with the same key, the first segment wins."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self._begins = np.cumsum([0, *(len(segment.entries) for segment in segments)]).tolist()
        # As strings the keys compare exactly: all have 16 bytes, and numpy pads with the zeros that it strips.
        keys = np.concatenate([np.empty(0, "S16"), *(segment.entries["key"] for segment in segments)])
        rows = np.argsort(keys, kind="stable")  # merges the sorted runs in linear time
        keys = keys[rows]
        first = np.ones(len(keys), dtype=np.bool_)
        first[1:] = keys[1:] != keys[:-1]
        self.keys, self.rows = keys[first], rows[first]

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the row of each key, counted through all segments, or -1."""
        if not len(self.keys):
            return [-1] * len(keys)
        wanted = np.array(keys, dtype="S16")
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        rows: list[int] = np.where(self.keys[places] == wanted, self.rows[places], -1).tolist()
        return rows

    def locate(self, row: int) -> tuple[Segment, int, int, int]:
        """Return the segment of a row, and its start, length and checksum there."""
        number = bisect_right(self._begins, row) - 1
        segment = self.segments[number]
        _, start, length, checksum = segment.entries.item(row - self._begins[number])
        return segment, start, length, checksum


def write_segment(folder: Path, entries: Entries, rows: Iterable[Values]) -> None:
    """Write rows in the order of their entries, and set the entries' `start`."""
    ends = np.cumsum(entries["length"], dtype=np.int64)
    entries["start"] = ends - entries["length"]
    index = entries.tobytes()
    middle, end = len(index), len(index) + 4 * int(ends[-1])
    header = json.dumps(
        {
            "__metadata__": {"index_crc32": str(crc32(index)), "cache": folder.name},
            "index": {"dtype": "U8", "shape": [len(entries), ENTRY.itemsize], "data_offsets": [0, middle]},
            "values": {"dtype": "F32", "shape": [(end - middle) // 4], "data_offsets": [middle, end]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)  # safetensors aligns its data
    path = folder / f"{time.time_ns()}-{uuid4().hex}.safetensors"  # sorts by age, unique to this process
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header + index)
        file.writelines(row.data for row in rows)
