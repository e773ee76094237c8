"""Restriction of the classes that an opened file may import to trusted ones.

Checkpoints, exported folders and a run's `config.yaml` name classes by dotted paths, and importing a path runs its
module. So the author of a file could run any code here. While a file is open, it may only name components of this
package or of Lightning, components already imported, and classes that the user has named: in an argument
`trust_classes`, on the command line, or in a configuration given with `--config`.
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

from jsonargparse import _typehints, _util  # there is no public hook for the check of a path
from jsonargparse._common import check_import_path as _check

from prlhf_lightning.errors import ConfigurationError

#: Base classes of components, and settings, that a file may name once they are imported.
_COMPONENTS = {
    "prlhf_lightning.user_models": ("UserModel",),
    "prlhf_lightning.policies": ("Policy", "LoRA", "Sampling"),
    "prlhf_lightning.losses": ("PreferenceLoss", "PolicyGradientLoss", "UserScale"),
    "prlhf_lightning.online": ("Reward", "RewardFunction"),
    "prlhf_lightning.rewards": ("RewardBackbone",),
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
#: Packages whose modules a file may import.
_PACKAGES = {path.partition(".")[0] for path in _COMPONENTS}
_SHOWN, _LONGEST = 10, 200  # classes that a message names, and characters of a name


class _Consent(Protocol):
    folder: Path

    def check(self, path: str) -> None:
        """Raise ConfigurationError if a dotted path may not be imported."""


@dataclass
class _OfUser:
    """Policy for the user's own arguments: any class, and modules in the current folder.

    Attributes:
        folder: The user's current folder; jsonargparse changes to a configuration's folder while reading it.
    """

    folder: Path

    def check(self, path: str) -> None:
        _find_in(self.folder, path)
        _check(path)


@dataclass
class _OfFile:
    """Policy for an opened file: only trusted classes.

    Attributes:
        file: Name of the file.
        trusted: Classes named by the user.
        trust_remote_code: Whether code that comes with a base model may run.
        remedy: The fix, for the message.
        refused: Other classes named by the file.
        folder: The user's current folder.
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
        # "<locals>" is in the qualified name of an object that was found by another path.
        return "<locals>" in path or _is_component(path)

    def refusal(self) -> ConfigurationError:
        paths = list(dict.fromkeys(self.refused))
        if odd := next(filter(_is_no_class_of_users, paths), None):
            return ConfigurationError(
                f"{self.file} names {odd[:_LONGEST]!r} as a class, which is not part of any model."
            )
        names = " ".join(paths[:_SHOWN])
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        return ConfigurationError(
            f"{self.file} names {names.replace(' ', ', ')}{more}, not of this package. Importing a class runs its "
            f"module's code, which only you can allow. If you trust it, {self.remedy.format(names)}."
        )


_current: ContextVar[_Consent | None] = ContextVar("consent", default=None)


def _check_by_consent(path: str) -> None:
    consent = _current.get()
    (_check if consent is None else consent.check)(path)


# jsonargparse calls this before it imports a path from a value; not for types in code.
for _module in (_util, _typehints):
    vars(_module)[_check.__name__] = _check_by_consent


@contextmanager
def only_trusted_classes(
    file: object, trust_classes: Collection[str] | None = None, trust_remote_code: bool = False, content: Any = None
) -> Iterator[None]:
    """Allow only trusted classes in imports within the block.

    Args:
        file: Name of the file, for messages.
        trust_classes: Dotted paths of other classes that it may name; they are imported.
        trust_remote_code: Whether code that comes with a base model may run.
        content: Content of the file, if known, so one message can list all its classes.

    Raises:
        ConfigurationError: The file names other classes, or a trusted class does not exist.
    """
    trusted = list(trust_classes or ())
    for path in trusted:
        try:
            imported(path)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"trust_classes: {path!r} can't be imported ({error}); give the dotted path of a class, such as "
                "my_file.MyClass, that is installed or in the current folder."
            ) from error
    remedy = "name it: `--trust_classes {}` (in Python the argument trust_classes, or import the module first)"
    consent = _OfFile(str(file), set(trusted), trust_remote_code, remedy)
    _check_all(consent, content)
    token = _current.set(consent)
    try:
        yield
    except Exception as error:  # a library may have caught and wrapped it
        if consent.refused:
            raise consent.refusal() from error
        raise
    finally:
        _current.reset(token)


@contextmanager
def words_of_user() -> Iterator[None]:
    """Allow the arguments of a command, parsed in the block, to name any class; see `words_beside`."""
    token = _current.set(_OfUser(Path.cwd()))
    try:
        yield
    finally:
        _current.reset(token)


def words_beside(file: Path, words: Collection[str], content: Any) -> None:
    """Restrict a configuration that a command has found by itself, for the rest of its `words_of_user` block.

    Args:
        file: The configuration.
        words: The user's arguments, class paths or others.
        content: Content of the file.

    Raises:
        ConfigurationError: The file names other classes.
    """
    consent = _OfFile(str(file), set(words), False, f"name the file: `--config {file}`")
    _check_all(consent, content)
    _current.set(consent)


def current_folder() -> Path:
    """Return the user's current folder, even while jsonargparse reads a configuration in another folder."""
    consent = _current.get()
    return Path.cwd() if consent is None else consent.folder


def raise_refusal() -> None:
    """Raise the error about refused classes, if there are any."""
    consent = _current.get()
    if isinstance(consent, _OfFile) and consent.refused:
        raise consent.refusal()


def allows_remote_code() -> bool:
    """Return whether a set `trust_remote_code` comes from the user instead of an opened file."""
    consent = _current.get()
    return not isinstance(consent, _OfFile) or consent.trust_remote_code


def imported(path: str) -> Any:
    """Import the object of a dotted path; also searches the current folder.

    Raises:
        ImportError: The module or the name in it does not exist.
        ValueError: It is not a dotted path.
    """
    _find_in(current_folder(), path)
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    return import_module(path) if found is None else found


def named_by_file(path: str) -> Any:
    """Import an object named by the opened file; raises like `imported`, and ConfigurationError if not trusted."""
    if (consent := _current.get()) is not None:
        consent.check(path)
    return imported(path)


def class_paths(content: Any) -> Iterator[str]:
    """Yield all dotted class paths in nested mappings and lists."""
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
    """Return whether a path names a known component; imports only this package and Lightning."""
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in _PACKAGES:
        with suppress(ImportError, ValueError):
            import_module(module)
        found = getattr(sys.modules.get(module), name, None)
    else:
        # Without `getattr`, because a module's `__getattr__` may import.
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    bases = (getattr(sys.modules.get(place), base, None) for place, names in _COMPONENTS.items() for base in names)
    return isinstance(found, type) and issubclass(found, tuple(base for base in bases if base is not None))


def _find_in(folder: Path, path: str) -> None:
    """Add a folder at the end of Python's search path if a module is not found elsewhere."""
    top = path.partition(".")[0]
    is_there = top.isidentifier() and ((folder / top).is_dir() or (folder / f"{top}.py").is_file())
    if is_there and top not in sys.modules and find_spec(top) is None and str(folder) not in sys.path:
        sys.path.append(str(folder))
