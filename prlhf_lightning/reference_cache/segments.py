"""The files of a reference cache: each is written once and whole, mapped, and searched by key."""

from __future__ import annotations

import json
import mmap
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4
from zlib import crc32

import numpy as np
import numpy.typing as npt

from prlhf_lightning.files import atomically

Values: TypeAlias = npt.NDArray[np.float32]
Entries: TypeAlias = npt.NDArray[np.void]

ENTRY = np.dtype([("key", "S16"), ("start", "<i8"), ("length", "<i4"), ("checksum", "<u4")])
"""A row of an index."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment as it lies on disk.

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
            ValueError: It is damaged, or of another cache, which earlier versions did not note.
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
    """Finds keys in several segments; of rows with the same key, the first segment's counts."""

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
    """Write rows in the order of their entries, whose starts are set here."""
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
    with atomically(path) as file:
        file.write(len(header).to_bytes(8, "little") + header + index)
        file.writelines(row.data for row in rows)
