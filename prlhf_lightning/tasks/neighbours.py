"""What a run, and the runs and exports beside it, have written: which files there are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prlhf_lightning.export_checksums import SETTINGS
from prlhf_lightning.tasks.model_card import is_card

_SIGNS = ("checkpoints", "config.yaml")  # of a run's folder
_OF_LOGGERS = frozenset(("mlruns", "mlartifacts", "wandb", "lightning_logs", "tb_logs", "tensorboard"))
_CHECKPOINTS = "checkpoints"


def is_export(folder: Path) -> bool:
    """Return whether a folder is one that `export` wrote."""
    return (folder / SETTINGS).is_file() or is_card(folder / "README.md")


@dataclass
class Neighbours:
    """The files in and beside a run.

    Attributes:
        files: Each with the outermost folder of which all was looked at, or itself.
        left_out: Folders that were not looked into.
        unreadable: Folders that can't be.
    """

    files: list[tuple[Path, Path]] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _above: set[str] = field(default_factory=set)  # folders in which something was looked at

    @classmethod
    def of(cls, folders: Iterable[Path], also: Sequence[Path] = ()) -> Neighbours:
        """Find the files.

        In the run of a folder of checkpoints, and in all runs, exports and folders of loggers that are in the folder
        around it, everything is looked at; in the folders around these, the files that lie in them directly.

        Args:
            folders: Folders with checkpoints in them.
            also: More files and folders, to look at everything in.
        """
        found = cls()
        around: dict[Path, None] = {}
        for folder in folders:
            run = _run_of(folder)
            roots = [run] if run else []
            base = run.parent if run else folder
            roots += _beside(base)
            for root in roots:
                found._walk(root)
                around |= dict.fromkeys((base, root.parent))
            around[base] = None
        for base in around:
            found._look_at(base)
        for path in also:
            found._walk(path) if path.is_dir() else found._add(path, path)
        found.left_out = [path for path in found.left_out if not found._knows(path)]
        return found

    def _knows(self, folder: Path) -> bool:
        return (real := os.path.realpath(folder)) in self._seen or real in self._above

    def _walk(self, root: Path) -> None:
        self._above.update(map(str, Path(os.path.realpath(root)).parents))
        for place, folders, files in os.walk(root, onerror=self._unreadable):
            here = Path(place)
            if (real := os.path.realpath(here)) in self._seen:
                folders.clear()
                continue
            self._seen.add(real)
            for name in sorted(files):
                self._add(root, here / name)
            folders.sort()
            for link in (here / name for name in folders if (here / name).is_symlink()):
                if link.name == _CHECKPOINTS:
                    self._walk(link)
                else:  # it may lead to a base model, or to all data
                    self.left_out.append(link)

    def _look_at(self, base: Path) -> None:
        """Take the files of a folder, but not of the folders in it."""
        if os.path.realpath(base) in self._seen:
            return
        try:
            entries = sorted(base.iterdir())
        except OSError:
            self.unreadable.append(base)
            return
        for path in entries:
            if path.is_file():
                self._add(path, path)
            elif path.is_dir() and not self._knows(path):
                self.left_out.append(path)

    def _add(self, root: Path, path: Path) -> None:
        name = os.path.join(os.path.realpath(path.parent), path.name)
        if path.is_file() and name not in self._seen:  # and no pipe, which would wait for a writer
            self._seen.add(name)
            self.files.append((root, path))

    def _unreadable(self, error: OSError) -> None:
        self.unreadable.append(Path(str(error.filename)))


def _run_of(folder: Path) -> Path | None:
    """Return the folder of the run that a folder of checkpoints is of, or None if it is of none."""
    if not folder.name or folder.name == "..":
        folder = folder.resolve()
    if folder.name == _CHECKPOINTS:
        return folder.parent if folder.parent.name else folder.resolve().parent
    return folder if (folder / "config.yaml").is_file() or (folder / _CHECKPOINTS).is_dir() else None


def _beside(base: Path) -> Iterator[Path]:
    """Yield the runs in a folder and in the folders in it, whatever a logger has named them, exports and logs."""
    signs = sorted(sign for part in ("*", "*/*") for name in _SIGNS for sign in base.glob(f"{part}/{name}"))
    yield from dict.fromkeys(sign.parent for sign in signs)
    for folder in sorted(path for path in base.glob("*") if path.is_dir()):
        if folder.name in _OF_LOGGERS or is_export(folder):
            yield folder
