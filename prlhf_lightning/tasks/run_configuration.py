"""The configuration of a run: how it is known to be what `fit` wrote, and found for commands on its checkpoints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # it has no stubs

from prlhf_lightning.checkpoint_files import checkpoint_of
from prlhf_lightning.consent import words_beside
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.files import write_whole
from prlhf_lightning.tasks.last_checkpoint import last_checkpoint

_COMMANDS = {"validate", "test", "predict"}
_MARK = "# sha256 of the lines below: "


def seal_configuration(path: Path) -> None:
    """Put the SHA-256 of a configuration into a comment before it."""
    content = path.read_bytes()
    write_whole(path, f"{_MARK}{sha256(content).hexdigest()}\n".encode() + content)


def check_configuration(path: Path) -> None:
    """Check that the configuration of a run is as `fit` wrote it, which earlier versions did without a checksum.

    Raises:
        ConfigurationError: It was changed or damaged, or is no text.
    """
    if changed := _change_of(path):
        raise ConfigurationError(changed)


def tell_of_changes(words: Sequence[str]) -> None:
    """Warn where a configuration that a command names is not as `fit` wrote it; people change them for another run.

    Raises:
        ConfigurationError: One is no text.
    """
    for name, value in _options(words):
        path = Path(value)
        if name in ("-c", "--config") and path.is_file() and (changed := _change_of(path)):
            warnings.warn(changed, stacklevel=2)


def _change_of(path: Path) -> str | None:
    """Return what to tell of a configuration that is not as `fit` wrote it, or None."""
    content = path.read_bytes()
    first, _, below = content.partition(b"\n")
    if first.startswith(_MARK.encode()) and first != f"{_MARK}{sha256(below).hexdigest()}".encode():
        return (
            f"{path} is not as `fit` wrote it: it is damaged, or was changed. If you changed it on purpose, delete its "
            "first line, which is the checksum."
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line}: is no UTF-8 text ({error.reason}); save it as UTF-8.") from None
    if "\0" in text:
        raise ConfigurationError(f"{path} holds zeros, as a file that was not written to its end; write it again.")
    return None


def configuration_of_run(words: Sequence[str], runs: str) -> Path | None:
    """Return the `config.yaml` of the checkpoint's run that a command is about, where its words configure no model.

    Args:
        words: The words, such as `validate --ckpt_path runs/version_0/checkpoints/last.ckpt`.
        runs: The folder of runs, where `--trainer.default_root_dir` does not name another.

    Raises:
        ConfigurationError: There is no such file, so that it must be named.
    """
    given = dict(_options(words))
    configures = any(name in ("-c", "--config") or name.startswith("--model") for name in given)
    path = given.get("--ckpt_path")
    if not words or words[0] not in _COMMANDS or not path or configures or {"-h", "--help"} & set(words):
        return None
    checkpoint = Path(path)
    if path == "last":
        root = given.get("--trainer.default_root_dir", runs)
        newest = last_checkpoint(root)
        if newest is None:
            raise ConfigurationError(f"ckpt_path: there is no checkpoint of any run in {root}; name one by its path.")
        checkpoint = newest
    checkpoint = checkpoint_of(checkpoint, "ckpt_path")
    if not checkpoint.exists():
        raise ConfigurationError(
            f"ckpt_path: there is no checkpoint {checkpoint}; give a .ckpt file of an earlier run."
        )
    places = [folder / "config.yaml" for folder in (checkpoint.parent.parent, checkpoint.parent)]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise ConfigurationError(
            f"config: there is no {places[0]}, as `fit` writes it; name the configuration of the run with --config."
        )
    check_configuration(config)
    return config


def with_configuration(words: Sequence[str], config: Path) -> list[str]:
    """Return the words of a command with a configuration that was found, of which only they may ask to run code.

    Raises:
        ConfigurationError: The configuration names classes that are not of this package, and that no word names.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None  # the parser says what is wrong with it
    words_beside(config, _class_paths(words), content)
    return [words[0], f"--config={config}", "--weights_only=null", *words[1:]]


def _class_paths(words: Sequence[str]) -> set[str]:
    """Return the dotted paths among words; what is the name of a file is none."""
    values = {value for _, value in _options(words) if re.fullmatch(r"\w+(\.\w+)+", value) and not Path(value).exists()}
    return values.union(*(re.findall(r"class_path[\"']?[:=]\s*[\"']?([\w.]+)", word) for word in words))


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names and values of options."""
    found = []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            after = words[number + 1] if number + 1 < len(words) else ""
            found.append((name, value if equals else after))
    return found
