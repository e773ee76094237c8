"""Data source of local files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TypeAlias

from prlhf_lightning.data.readers import Unreadable, is_readable, read_rows, scan_rows
from prlhf_lightning.data.records import spell_user_id
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError

# The order matters: a configuration is saved as the first of these types that fits. With `Path` before a plain list,
# a list would be saved as one string.
Paths: TypeAlias = str | list[str] | Sequence[str | Path] | Path
_SPLIT_NAMES = ("train", "valid", "val", "dev", "test", "eval")  # words in the file names of a split


class FileSource(DataSource):
    """Reads JSON Lines, JSON, CSV, TSV (each also gzipped) and Parquet files. Integer user ids become strings.

    Args:
        train: Path of the training file, or a list of paths. A path may be a pattern, such as `data/train-*.jsonl`, or
            a folder, whose files are all read in the order of their names.
        validation: Validation file or files; without them the data module holds out a part of `train`.
        test: Test file or files.
        columns: Column names that differ from the field names, such as `{user_id: worker}`.
        delimiter: Separator of the columns in CSV files. By default it is detected: comma, semicolon, tab or bar.
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
                    raise ConfigurationError(f"The {split} split is an empty list of files; give one, or leave it out.")

    def splits(self) -> set[Split]:
        """Return the splits with files."""
        return set(self._paths)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location (file and line) and row of a split's files, in order."""
        for path in self._paths[split]:
            for where, row in read_rows(path, self._delimiter):
                yield where, spell_user_id(row, self._id_column)

    def scan(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any] | Unreadable]]:
        """Yield the same as `rows`; after an unreadable row, continue with the next row or the next file."""
        for path in self._paths[split]:
            for where, row in scan_rows(path, self._delimiter):
                yield where, row if isinstance(row, Unreadable) else spell_user_id(row, self._id_column)

    def fingerprint(self, split: Split) -> str:
        """Return path, size and modification time of each file.

        It includes the path as given, because the cache stores the rows' locations in this form.
        """
        parts = [f"delimiter {self._delimiter!r}"] if self._delimiter else []
        for path in self._paths[split]:
            try:
                stat = path.stat()
            except FileNotFoundError:
                fix = f"check the path (it is relative to {Path.cwd()})"
                raise FeedbackFormatError("there is no such file", fix, where=str(path)) from None
            except OSError as error:
                fix = "check the path and its rights"
                raise FeedbackFormatError(f"cannot be read ({error})", fix, where=str(path)) from None
            parts.append(f"{path} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
        return "\n".join(parts)


def files_at(path: Path) -> list[Path]:
    """Return the files of a path (a file, a folder or a pattern), sorted by name.

    Raises:
        ConfigurationError: There is no file, or a folder holds several splits.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and is_readable(file))
        if not found:
            raise ConfigurationError(f"{path}: the folder holds no .jsonl, .json, .csv, .tsv or .parquet file.")
        splits = {name for file in found for name in _SPLIT_NAMES if re.search(rf"(?<![a-z]){name}", file.name.lower())}
        if len(splits) > 1:
            raise ConfigurationError(
                f"{path}: the folder holds files of several splits ({found[0].name}, {found[-1].name}); give the files "
                f"of each split, such as train: {path}/train*."
            )
        return found
    if path.exists() or not has_magic(str(path)):
        return [path]  # reading it reports a missing file
    matching = sorted(Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file())
    if not matching:
        raise ConfigurationError(f"{path}: no file matches; check the pattern (it is relative to {Path.cwd()}).")
    return matching
