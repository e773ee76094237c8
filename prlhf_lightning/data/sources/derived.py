"""SUBCLASS HERE: feedback that is made, by a protocol, out of rows of another shape."""

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
        """Yield the raw rows, each after where it stands."""
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
    """Return the rows of local files where any are named, or else of a hub data set's split, or of its `data_files`."""
    if files is not None:
        return Part(FileSource(files))
    only = None if data_files is None else {split: data_files}
    return Part(HubSource(hub, name, train_split=split, revision=revision, data_files=only))


class DerivedSource(DataSource):
    """Pairs made out of raw rows, with count kept of those that the protocol leaves out.

    Args:
        parts: For each split that there is, the raw rows that it is made of.
        settings: All else that the pairs depend on; part of the fingerprint.

    Attributes:
        version: Raised whenever the same raw rows and settings come to give other pairs.
    """

    version = 1

    def __init__(self, parts: Mapping[Split, Sequence[Part]], **settings: Any) -> None:
        self._parts = dict(parts)
        self._settings = settings
        self._counts: dict[Split, Counter[str]] = {}

    @abstractmethod
    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of a split as `rows` does, and count in `counts` what is left out, by reason."""

    def splits(self) -> set[Split]:
        """Return the splits that raw rows were named for."""
        return set(self._parts)

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of a split, each after where its raw row stands."""
        self._counts[split] = Counter()
        yield from self.pairs(split, self._counts[split])

    def counts(self, split: Split) -> dict[str, int]:
        """Return how many raw rows, or pairs, were left out of a split in the last pass, by reason."""
        return dict(self._counts.get(split, {}))

    def fingerprint(self, split: Split) -> str:
        """Return the settings, and the fingerprints of all raw rows: a split may depend on another's."""
        parts = dict.fromkeys(part for parts in self._parts.values() for part in parts)
        raw = [part.source.fingerprint(part.split) for part in parts]
        return "\n".join([f"{type(self).__name__} v{self.version} {split} {sorted(self._settings.items())}", *raw])


def unusable(chosen: str, rejected: str, what: str) -> str | None:
    """Return why two completions make no pair, as a reason to be left out, or None if they do.

    Public data hold some such; training refuses them, as in files of one's own they are mistakes.

    Args:
        chosen: The preferred one.
        rejected: The other.
        what: What they are, in the plural, for the reason.
    """
    if not chosen.strip() or not rejected.strip():
        return f"empty {what}"
    return f"equal {what}" if chosen == rejected else None


def left_out(reason: str) -> str:
    """Return the name under which rows that were left out are counted."""
    return f"left out ({reason})"


def filled(template: str, values: Mapping[str, str]) -> str:
    """Put each value in the place `{name}` of a template; other braces stay, and so do those in values."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), template)


def check_template(setting: str, template: str, known: Sequence[str]) -> None:
    """Refuse a template with places that nothing will fill.

    Raises:
        ConfigurationError: It has such a place, or none at all.
    """
    places = _PLACE.findall(template)
    unknown = sorted(set(places) - set(known))
    if unknown or not places:
        what = f"has a place {{{unknown[0]}}}" if unknown else "has no place to fill"
        raise ConfigurationError(f"{setting} {what}; there are {', '.join(f'{{{name}}}' for name in known)}.")
