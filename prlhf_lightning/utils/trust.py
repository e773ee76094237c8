"""Which code a file may have run that is opened: the components of this package and of Lightning, and nothing else.

A checkpoint, an exported folder and a run's `config.yaml` name classes by dotted paths, and to import a path runs its
module. Whoever wrote the file would choose what runs here. While a file is open, it may therefore only name components
that come with this package or with Lightning, that have been imported already, or that the user has named: in an
argument `trust_classes`, on the command line, or in a configuration given there with `--config`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import _typehints, _util  # there is no public place where the check of a path can be replaced
from jsonargparse._common import check_import_path as _check

from prlhf_lightning.errors import ConfigurationError

#: What a file may name, by where it is found once that has been imported: the bases of components, and settings.
_COMPONENTS = {
    "prlhf_lightning.user_models": ("UserModel",),
    "prlhf_lightning.policies": ("Policy", "LoRA", "Sampling"),
    "prlhf_lightning.losses": ("PreferenceLoss",),
    "prlhf_lightning.training": ("Optim",),
    "prlhf_lightning.data": ("DataSource",),
    "prlhf_lightning.analysis.judges": ("Judge",),
    "lightning.pytorch": ("Callback",),
    "lightning.pytorch.loggers": ("Logger",),
    "lightning.pytorch.profilers": ("Profiler",),
    "lightning.pytorch.strategies": ("Strategy",),
    "lightning.pytorch.accelerators": ("Accelerator",),
    "lightning.pytorch.plugins": ("CheckpointIO", "ClusterEnvironment", "LayerSync", "Precision"),
}
#: Packages whose modules may be imported for the sake of a file.
_PACKAGES = {path.partition(".")[0] for path in _COMPONENTS}
_SHOWN, _LONGEST = 10, 200  # classes that a message names, and characters of a name


class _Consent(Protocol):
    folder: Path

    def check(self, path: str) -> None:
        """Raise ConfigurationError where a dotted path may not be imported."""


@dataclass
class _OfUser:
    """The user's own words may name anything, and modules in the current folder.

    Attributes:
        folder: The current folder: while jsonargparse reads a configuration, it makes the configuration's the current.
    """

    folder: Path

    def check(self, path: str) -> None:
        _find_in(self.folder, path)
        _check(path)


@dataclass
class _OfFile:
    """What a file that is opened may name.

    Attributes:
        file: What it is called.
        trusted: What the user has named.
        trust_remote_code: Whether code that comes with a base model may run.
        remedy: What to do to have the classes imported.
        refused: What it has named beside.
        folder: The current folder.
    """

    file: str
    trusted: set[str]
    trust_remote_code: bool
    remedy: str
    refused: list[str] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: current_folder())

    def check(self, path: str) -> None:
        if not self.allows(path):
            self.refused.append(path)
            raise self.refusal()

    def allows(self, path: str) -> bool:
        if path in self.trusted:
            found = imported(path)
            # jsonargparse also asks for the place where an object was made.
            self.trusted.add(f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}")
            return True
        return "<locals>" in path or _is_component(path)  # the former stands for what was found by another path

    def refusal(self) -> ConfigurationError:
        paths = list(dict.fromkeys(self.refused))
        if odd := next(filter(_is_no_class_of_users, paths), None):
            return ConfigurationError(f"{self.file} names {odd[:_LONGEST]!r} as a class, which no model is made of.")
        names = " ".join(paths[:_SHOWN])
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        return ConfigurationError(
            f"{self.file} names {names.replace(' ', ', ')}{more}, not of this package. To import a class runs its "
            f"module's code, which nobody but you can allow. If you trust it, {self.remedy.format(names)}."
        )


_current: ContextVar[_Consent | None] = ContextVar("consent", default=None)


def _check_by_consent(path: str) -> None:
    consent = _current.get()
    (_check if consent is None else consent.check)(path)


# jsonargparse calls this before it imports a path that is a value, and not a type in somebody's code.
for _module in (_util, _typehints):
    vars(_module)[_check.__name__] = _check_by_consent


@contextmanager
def only_trusted_classes(
    file: object, trust_classes: Collection[str] | None = None, trust_remote_code: bool = False, content: Any = None
) -> Iterator[None]:
    """Import in the block only what a file may name.

    Args:
        file: What the file is called, for messages.
        trust_classes: Dotted paths of other classes that it may name; they are imported.
        trust_remote_code: Whether it may have the code run that comes with a base model.
        content: What the file holds, as far as it is known, so that one message names all its classes.

    Raises:
        ConfigurationError: The file names other classes, or one that is trusted is not there.
    """
    trusted = list(trust_classes or ())
    for path in trusted:
        try:
            imported(path)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"trust_classes: {path!r} can't be imported ({error}); give the dotted path of a class, as "
                "my_file.MyClass, of what is installed or lies in the current folder."
            ) from error
    remedy = "name it: `--trust_classes {}` (in Python the argument trust_classes, or import the module first)"
    consent = _OfFile(str(file), set(trusted), trust_remote_code, remedy)
    _check_all(consent, content)
    token = _current.set(consent)
    try:
        yield
    except Exception as error:  # others may have caught and wrapped it
        if consent.refused:
            raise consent.refusal() from error
        raise
    finally:
        _current.reset(token)


@contextmanager
def words_of_user() -> Iterator[None]:
    """Let the words of a command, read in the block, name any class; see `words_beside`."""
    token = _current.set(_OfUser(Path.cwd()))
    try:
        yield
    finally:
        _current.reset(token)


def words_beside(file: Path, words: Collection[str], content: Any) -> None:
    """Let a command, for the rest of its block of `words_of_user`, use a configuration that it has found by itself.

    Args:
        file: The configuration.
        words: What the user has named, which may be anything beside class paths.
        content: What the file holds.

    Raises:
        ConfigurationError: The file names other classes.
    """
    consent = _OfFile(str(file), set(words), False, f"name the file: `--config {file}`")
    _check_all(consent, content)
    _current.set(consent)


def current_folder() -> Path:
    """Return the folder that the user is in, also while a configuration in another is read."""
    consent = _current.get()
    return Path.cwd() if consent is None else consent.folder


def raise_refusal() -> None:
    """Raise the error about what a file may not name, where that is why something went wrong."""
    consent = _current.get()
    if isinstance(consent, _OfFile) and consent.refused:
        raise consent.refusal()


def allows_remote_code() -> bool:
    """Return whether a `trust_remote_code` that is set is the user's word, and not that of a file that is opened."""
    consent = _current.get()
    return not isinstance(consent, _OfFile) or consent.trust_remote_code


def imported(path: str) -> Any:
    """Return what a dotted path names; modules in the current folder are found too.

    Raises:
        ImportError: There is no such module, or nothing of that name in it.
        ValueError: It is no dotted path.
    """
    _find_in(current_folder(), path)
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    return import_module(path) if found is None else found


def named_by_file(path: str) -> Any:
    """Return what the file that is opened names; raises as `imported`, and ConfigurationError where it may not."""
    if (consent := _current.get()) is not None:
        consent.check(path)
    return imported(path)


def class_paths(content: Any) -> Iterator[str]:
    """Yield the dotted paths of classes that stand anywhere in mappings and lists."""
    rest, seen = [content], set()
    while rest:
        one = rest.pop()
        if id(one) in seen or not isinstance(one, Mapping | list | tuple):
            continue
        seen.add(id(one))
        if isinstance(one, Mapping) and isinstance(path := one.get("class_path"), str) and "." in path:
            yield path
        rest.extend(reversed(list(one.values() if isinstance(one, Mapping) else one)))


def _check_all(consent: _OfFile, content: Any) -> None:
    consent.refused = [path for path in class_paths(content) if not consent.allows(path)]
    if consent.refused:
        raise consent.refusal()


def _is_no_class_of_users(path: str) -> bool:
    is_path = "." in path and len(path) <= _LONGEST and all(part.isidentifier() for part in path.split("."))
    return not is_path or path.partition(".")[0] in {*_PACKAGES, *sys.stdlib_module_names}


def _is_component(path: str) -> bool:
    """Say whether a path names a component that is known, importing no more than this package and Lightning."""
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in _PACKAGES:
        with suppress(ImportError, ValueError):
            import_module(module)
        found = getattr(sys.modules.get(module), name, None)
    else:
        # Not by `getattr`: a module may import what it is asked for.
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    bases = (getattr(sys.modules.get(place), base, None) for place, names in _COMPONENTS.items() for base in names)
    return isinstance(found, type) and issubclass(found, tuple(base for base in bases if base is not None))


def _find_in(folder: Path, path: str) -> None:
    """Let Python look into a folder, after all else, for a module that is nowhere else."""
    top = path.partition(".")[0]
    is_there = top.isidentifier() and ((folder / top).is_dir() or (folder / f"{top}.py").is_file())
    if is_there and top not in sys.modules and find_spec(top) is None and str(folder) not in sys.path:
        sys.path.append(str(folder))
