"""Base class of sources that derive feedback from rows of another schema; subclass it for a public data set."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.sources.files import FileSource, Paths
from prlhf_lightning.data.sources.hub import HubSource
from prlhf_lightning.errors import ConfigurationError

_PLACE = re.compile(r"\{(\w+)\}")


class Part(NamedTuple):
    """One split of a source of raw rows."""

    source: DataSource
    split: Split = "train"

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location and content of each raw row."""
        return self.source.rows(self.split)


def original(
    files: Paths | None,
    hub: str,
    split: str = "train",
    *,
    name: str | None = None,
    revision: str | None = None,
    data_files: str | None = None,
) -> Part:
    """Return the raw rows of local files if given; otherwise those of a hub data set's split or its `data_files`."""
    if files is not None:
        return Part(FileSource(files))
    only = None if data_files is None else {split: data_files}
    return Part(HubSource(hub, name, train_split=split, revision=revision, data_files=only))


class DerivedSource(DataSource):
    """Base class: derives pairs from raw rows and counts those left out, by reason.

    Args:
        parts: The raw rows of each split.
        settings: Everything else that the pairs depend on; part of the fingerprint.

    Attributes:
        version: Increase it when the same raw rows and settings give other pairs than before.
    """

    version = 1

    def __init__(self, parts: Mapping[Split, Sequence[Part]], **settings: Any) -> None:
        self._parts = dict(parts)
        self._settings = settings
        self._counts: dict[Split, Counter[str]] = {}

    @abstractmethod
    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of a split as `rows` does; count pairs that are left out in `counts`, by reason."""

    def splits(self) -> set[Split]:
        """Return the splits with raw rows."""
        return set(self._parts)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the location of the raw row and the pair, for each pair of a split."""
        self._counts[split] = Counter()
        yield from self.pairs(split, self._counts[split])

    def counts(self, split: Split) -> dict[str, int]:
        """Return the number of raw rows or pairs left out of a split in the last pass, by reason."""
        return dict(self._counts.get(split, {}))

    def fingerprint(self, split: Split) -> str:
        """Return the settings and the fingerprints of all raw rows; a split may depend on those of another split."""
        parts = dict.fromkeys(part for parts in self._parts.values() for part in parts)
        raw = [part.source.fingerprint(part.split) for part in parts]
        return "\n".join([f"{type(self).__name__} v{self.version} {split} {sorted(self._settings.items())}", *raw])


def unusable(chosen: str, rejected: str, what: str) -> str | None:
    """Return the reason why two completions are not a valid pair; None if they are.

    Public data contain some invalid pairs, which are left out. In users' own files they are errors.

    Args:
        chosen: The preferred completion.
        rejected: The other completion.
        what: Plural noun for the completions, used in the reason.
    """
    if not chosen.strip() or not rejected.strip():
        return f"empty {what}"
    return f"equal {what}" if chosen == rejected else None


def left_out(reason: str) -> str:
    """Return the name of the count of rows that are left out for a reason."""
    return f"left out ({reason})"


def filled(template: str, values: Mapping[str, str]) -> str:
    """Replace each `{name}` in a template by its value; keep other braces, and braces in values."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), template)


def check_template(setting: str, template: str, known: Sequence[str]) -> None:
    """Reject a template with unknown placeholders, or without any.

    Raises:
        ConfigurationError: It has an unknown placeholder, or none.
    """
    places = _PLACE.findall(template)
    unknown = sorted(set(places) - set(known))
    if unknown or not places:
        what = f"has a placeholder {{{unknown[0]}}}" if unknown else "has no placeholder"
        raise ConfigurationError(f"{setting} {what}; available are {', '.join(f'{{{name}}}' for name in known)}.")
