"""Data source of Hugging Face hub data sets, and of folders that `datasets` can load without a script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from prlhf_lightning.data.readers.text import without_gaps
from prlhf_lightning.data.records import spell_user_id
from prlhf_lightning.data.sources.base import SPLITS, DataSource, Split
from prlhf_lightning.errors import ConfigurationError, Place
from prlhf_lightning.utils.hub import find_source_problem

_BUILDERS = {"arrow", "csv", "json", "parquet", "text"}  # names of builders of `datasets`, not of data sets


class HubSource(DataSource):
    """Loads a data set with `datasets.load_dataset`: downloaded once into the cache of `datasets`, or streamed.

    Args:
        path: Name on the hub, such as `organization/name`, or a local folder of data files.
        name: Configuration of the data set, if it has several.
        train_split: Split for training; slices such as `train[:10%]` work.
        validation_split: Split for validation; without it the data module holds out a part of the training split.
        test_split: Split for testing.
        revision: Branch, tag or commit on the hub; pin a commit for reproducible results.
        columns: Column names that differ from the field names, such as `{user_id: worker}`.
        data_files: Read only these files, by split, such as `{train: helpful-base/train*}`.
        streaming: Download rows as they are read, and store none; for `data.streaming`. Pin a `revision`: without one,
            changed rows are not detected.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        revision: str | None = None,
        columns: Mapping[str, str] | None = None,
        data_files: Mapping[str, str] | None = None,
        streaming: bool = False,
    ) -> None:
        self.columns = dict(columns or {})
        self._id_column = self.columns.get("user_id", "user_id")
        self._path, self._name, self._revision, self._streaming = path, name, revision, streaming
        self._data_files = dict(data_files or {})
        named = zip(SPLITS, (train_split, validation_split, test_split), strict=True)
        self._names: dict[Split, str] = {split: name for split, name in named if name is not None}
        self._loaded: dict[Split, datasets.Dataset | datasets.IterableDataset] = {}

    def splits(self) -> set[Split]:
        """Return the splits given in `__init__`."""
        return set(self._names)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location (such as `organization/name[train]:17`) and row of a split, in order."""
        files = self._data_files.get(self._names[split])
        place = f"{self._path}/{files}" if files else self._path
        for number, row in enumerate(self._load(split), start=1):
            whole = {name: without_gaps(value) for name, value in row.items()}
            yield Place(f"{place}[{self._names[split]}]", number), spell_user_id(whole, self._id_column)

    def fingerprint(self, split: Split) -> str:
        """Return the fingerprint of `datasets`, derived from the data files; for a stream, its names and revision."""
        if self._streaming:
            parts = (self._path, self._name, self._names[split], self._revision, self._data_files)
            return f"streamed {parts}"
        return f"{self._path} {self._names[split]} {self._load(split)._fingerprint}"  # it has no public name

    def _load(self, split: Split) -> datasets.Dataset | datasets.IterableDataset:
        if split not in self._loaded:
            wanted = f"split {self._names[split]!r}" + (f" of configuration {self._name!r}" if self._name else "")
            prefix = f"Data set {self._path!r}, {wanted}: cannot be loaded"
            own = "Files of your own are better read by FileSource, which names the line of an error."
            if self._path not in _BUILDERS and (problem := find_source_problem(self._path, "data")) is not None:
                raise ConfigurationError(f"{prefix}: {problem}. {own}")
            try:
                loaded = self._load_as(split, self._path == "csv")
                if loaded.info.builder_name == "csv" and self._path != "csv":
                    loaded = self._load_as(split, True)
                self._loaded[split] = loaded
            except Exception as error:  # from the file system, the network, the hub client or a format's reader
                raise ConfigurationError(
                    f"{prefix} ({type(error).__name__}: {error}); check the name, split and revision, the network, and "
                    f"HF_TOKEN if the data set is private. {own}"
                ) from error
        return self._loaded[split]

    def _load_as(self, split: Split, csv: bool) -> datasets.Dataset | datasets.IterableDataset:
        """Load a split; in CSV files, keep ids and texts unchanged (pandas turns `007` into 7)."""
        as_written = {"converters": {self._id_column: str}, "keep_default_na": False, "na_values": [""]} if csv else {}
        return datasets.load_dataset(
            self._path,
            self._name,
            data_files=self._data_files or None,
            split=self._names[split],
            revision=self._revision,
            streaming=self._streaming,
            **as_written,
        )
