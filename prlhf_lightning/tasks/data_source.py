"""What the `data` commands read: files named by their paths, or any source by its class."""

from __future__ import annotations

from collections.abc import Mapping

from prlhf_lightning.data.sources.base import DataSource
from prlhf_lightning.data.sources.files import FileSource, Paths
from prlhf_lightning.errors import ConfigurationError


def the_source(
    train: Paths | None,
    validation: Paths | None,
    test: Paths | None,
    columns: Mapping[str, str] | None,
    source: DataSource | None,
) -> DataSource:
    """Return the source that was named in one way or the other.

    Raises:
        ConfigurationError: It was named in neither way, or in both.
    """
    by_files = any(value is not None for value in (train, validation, test, columns))
    if source is not None:
        if by_files:
            raise ConfigurationError("source: name either files (train, validation, test, columns) or a source.")
        return source
    if train is None:
        raise ConfigurationError("train: name a file, as in `--train votes.jsonl`, or a source, as in `--source ...`.")
    return FileSource(train, validation, test, columns)
