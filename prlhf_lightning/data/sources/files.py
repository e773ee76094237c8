"""Feedback in the user's own files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TypeAlias

from prlhf_lightning.data.readers import Unreadable, is_readable, read_rows, scan_rows
from prlhf_lightning.data.schema import spell_user_id
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

# In this order: a configuration is written in the first of these forms that holds it, and with `Path` before a plain
# list, a list would be written as one string.
Paths: TypeAlias = str | list[str] | Sequence[str | Path] | Path
_SPLIT_NAMES = ("train", "valid", "val", "dev", "test", "eval")  # how names of files of one split begin, or go on


class FileSource(DataSource):
    """JSON Lines, JSON, CSV, TSV (each also gzipped) and Parquet files. Whole numbers for users' ids are strings.

    Args:
        train: Path of the training file, or a list of paths. A path may be a pattern, such as `data/train-*.jsonl`, or
            a folder, all files of which are then read, by name.
        validation: Validation file or files; without them the data module holds out a part of `train`.
        test: Test file or files.
        columns: Names of columns that differ from the fields', such as `{user_id: worker}`.
        delimiter: What separates the columns of CSV files. If none is given it is found out: commas, semicolons, tabs
            or bars.
    """

    def __init__(
        self,
        train: Paths,
        validation: Paths | None = None,
        test: Paths | None = None,
        columns: Mapping[str, str] | None = None,
        delimiter: str | None = None,
    ) -> None:
        if delimiter is not None and len(delimiter) != 1:
            raise ConfigurationError(f"delimiter is {delimiter!r}; give one character, such as ';'.")
        self._delimiter = delimiter
        self.columns = dict(columns or {})
        self._id_column = self.columns.get("user_id", "user_id")
        self._paths: dict[Split, list[Path]] = {}
        for split, paths in zip(SPLITS, (train, validation, test), strict=True):
            if paths is not None:
                given = [paths] if isinstance(paths, str | Path) else paths
                self._paths[split] = [file for path in given for file in files_at(Path(path))]
                if not self._paths[split]:
                    raise ConfigurationError(f"The {split} split is an empty list of files; name one, or leave it out.")

    def splits(self) -> set[Split]:
        """Return the splits for which files were named."""
        return set(self._paths)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the rows of a split's files in order, each after its file and line."""
        for path in self._paths[split]:
            for where, row in read_rows(path, self._delimiter):
                yield where, spell_user_id(row, self._id_column)

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield what `rows` does, but go on after what cannot be read: with the next row, or with the next file."""
        for path in self._paths[split]:
            for where, row in scan_rows(path, self._delimiter):
                yield where, row if isinstance(row, Unreadable) else spell_user_id(row, self._id_column)

    def fingerprint(self, split: Split) -> str:
        """Return path, size and modification time of each file.

        The path also as it was given, since what is kept of rows says where they stand in these words.
        """
        parts = [f"delimiter {self._delimiter!r}"] if self._delimiter else []
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


def files_at(path: Path) -> list[Path]:
    """Return the files that a path names: itself, those of a folder, or those that match a pattern, sorted by name.

    Raises:
        ConfigurationError: There is none, or a folder holds several splits.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and is_readable(file))
        if not found:
            raise ConfigurationError(f"{path}: the folder holds no .jsonl, .json, .csv, .tsv or .parquet file.")
        splits = {name for file in found for name in _SPLIT_NAMES if re.search(rf"(?<![a-z]){name}", file.name.lower())}
        if len(splits) > 1:
            raise ConfigurationError(
                f"{path}: the folder holds files of several splits ({found[0].name}, {found[-1].name}); name those of "
                f"each, as in train: {path}/train*."
            )
        return found
    if path.exists() or not has_magic(str(path)):
        return [path]  # what is not there is told where it is read
    matching = sorted(Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file())
    if not matching:
        raise ConfigurationError(f"{path}: no file matches; check the pattern (it is relative to {Path.cwd()}).")
    return matching
