"""Feedback in the user's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from prlhf_lightning.data.readers import Unreadable, read_rows, scan_rows
from prlhf_lightning.data.records import spell_user_id
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

# In this order: a configuration is written in the first of these forms that holds it, and with `Path` before a plain
# list, a list would be written as one string.
Paths: TypeAlias = str | list[str] | Sequence[str | Path] | Path


class FileSource(DataSource):
    """JSON Lines, JSON, CSV (each also gzipped) and Parquet files. Whole numbers for users' ids are read as strings.

    Args:
        train: Path of the training file, or a list of paths.
        validation: Validation file or files; without them the data module holds out a part of `train`.
        test: Test file or files.
        columns: Names of columns that differ from the fields', such as `{user_id: worker}`.
    """

    def __init__(
        self,
        train: Paths,
        validation: Paths | None = None,
        test: Paths | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.columns = dict(columns or {})
        self._id_column = self.columns.get("user_id", "user_id")
        self._paths: dict[Split, list[Path]] = {}
        for split, paths in zip(SPLITS, (train, validation, test), strict=True):
            if paths is not None:
                self._paths[split] = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
                if not self._paths[split]:
                    raise ConfigurationError(f"The {split} split is an empty list of files; name one, or leave it out.")

    def splits(self) -> set[Split]:
        """Return the splits for which files were named."""
        return set(self._paths)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the rows of a split's files in order, each after its file and line."""
        for path in self._paths[split]:
            for where, row in read_rows(path):
                yield where, spell_user_id(row, self._id_column)

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield what `rows` does, but go on after what cannot be read: with the next row, or with the next file."""
        for path in self._paths[split]:
            for where, row in scan_rows(path):
                yield where, row if isinstance(row, Unreadable) else spell_user_id(row, self._id_column)

    def fingerprint(self, split: Split) -> str:
        """Return path, size and modification time of each file.

        The path also as it was given, since what is kept of rows says where they stand in these words.
        """
        parts = []
        for path in self._paths[split]:
            try:
                stat = path.stat()
            except FileNotFoundError:
                raise FeedbackFormatError(
                    f"{path}: there is no such file; check the path (it is relative to {Path.cwd()})."
                ) from None
            except OSError as error:
                raise FeedbackFormatError(f"{path}: cannot be read ({error}); check the path and its rights.") from None
            parts.append(f"{path} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
        return "\n".join(parts)
