"""Lookup of earlier runs: their last checkpoint and their configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # it has no stubs
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning.errors import ConfigurationError, DamagedCheckpointError
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.utils.config_checksum import change_in, check_configuration
from prlhf_lightning.utils.trust import words_beside

_META = "meta.pt"  # unsharded part of a sharded checkpoint folder
_PARTS = ("seed_everything", "model", "data")
_TOLD = 3
#: Data settings that may change when a run is resumed: batching, loading and storage of rows.
_OF_BATCHES = {
    *("batch_size", "eval_batch_size", "pairs_per_user", "balance", "bucket_by_length", "max_tokens_per_batch"),
    *("streaming", "shuffle_buffer", "users_file", "num_workers", "cache_dir", "pin_memory", "chat_template_date"),
}


def last_checkpoint(
    *roots: str | Path, started_from: Mapping[str, str] | None = None, settings: Mapping[str, Any] | None = None
) -> Path | None:
    """Return the newest intact checkpoint of the newest run with any, or None.

    If newer ones are damaged, a warning names them and the returned one. Checkpoints of earlier runs, which may have
    another purpose, are never used in their place.

    Args:
        roots: Folders of runs.
        started_from: Consider only runs that were started from this source (`checkpoint_files.origin`).
        settings: Consider only runs whose `config.yaml` has the same model, data and seed as this configuration; a
            warning names newer runs with other settings. Runs that also batch rows in the same way have precedence.

    Raises:
        DamagedCheckpointError: The newest run has no intact checkpoint.
    """
    folders = {
        folder for root in roots for depth in ("", "*/", "*/*/") for folder in Path(root).glob(f"{depth}checkpoints")
    }
    runs = [files for folder in folders if (files := checkpoint_files.in_order(folder))]
    runs.sort(key=lambda files: _time(files[0]), reverse=True)
    run = _choose(runs, started_from, settings)
    if run is None:
        return None
    chosen = checkpoint_files.newest_intact(run[0].parent)
    damaged = [str(path) for path in (run[: run.index(chosen)] if chosen else run)]
    if chosen is None:
        raise DamagedCheckpointError(
            f"ckpt_path: no checkpoint of the last run is intact ({', '.join(damaged)}). Give the path of an earlier "
            "run's checkpoint, or start a new run without --ckpt_path."
        )
    if damaged:
        rank_zero_warn(f"Damaged: {', '.join(damaged)}. The newest intact checkpoint of that run is used: {chosen}")
    return chosen


def _choose(
    runs: list[list[Path]], started_from: Mapping[str, str] | None, settings: Mapping[str, Any] | None
) -> list[Path] | None:
    """Return the checkpoints of the run to resume, given those of each run, newest first."""
    other, similar = None, None
    for files in runs:
        differing = differences(files[0].parent.parent / "config.yaml", settings) if settings else []
        is_another = any(name not in _OF_BATCHES for name, _ in differing)
        if is_another:
            other = other or (files[0], differing)
        if is_another or not (started_from is None or _began_with(files, started_from)):
            continue
        if not differing:
            return files
        similar = similar or files
    if similar is None and other is not None:
        path, differing = other
        rank_zero_warn(
            f"The last run has other settings ({'; '.join(told for _, told in differing[:_TOLD])}), so it is not "
            f"resumed. To resume it anyway, give its path: --ckpt_path {path}"
        )
    return similar


def differences(config: Path, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings of model, data and seed that differ from a run's `config.yaml`, each with both values.

    Settings that are missing in the file (of an earlier version) count as equal; so do all settings if the file is
    missing or unreadable.
    """
    try:
        earlier = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(earlier, dict):
        return []
    now = dict(_flat("", {part: settings.get(part) for part in _PARTS}))
    was = dict(_flat("", {part: earlier[part] for part in _PARTS if part in earlier}))
    return [
        (name.removeprefix("data."), f"{name} was {value!r} and is {now.get(name)!r}")
        for name, value in was.items()
        if now.get(name) != value
    ]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, part in value.items() for pair in _flat(f"{name}.{key}" if name else str(key), part)]
    return [(name, value)]


def _time(path: Path) -> int:
    """Return the modification time of a file; a missing file counts as the oldest."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_start_of(source: Mapping[str, str], content: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's run was started from a source (`fit --init_from`).

    Args:
        source: `checkpoint_files.origin` of the source. If the source is missing, only the path counts.
        content: Content of the checkpoint.
    """
    began = entry_of(content).get("started_from") or {}
    name = "digest" if source["digest"] else "path"
    return bool(began) and began[name] == source[name]


def _began_with(files: list[Path], source: Mapping[str, str]) -> bool:
    """Return whether a run was started from a source, according to its first readable checkpoint."""
    for path in files:
        try:
            # Only this run's own checkpoint is checked in full later: of large ones that takes long.
            content = torch.load(path / _META if path.is_dir() else path, "cpu", weights_only=True, mmap=True)
            return is_start_of(source, content)
        except Exception:  # damaged files can raise anything
            continue
    return False


_COMMANDS = {"validate", "test", "predict"}


def tell_of_changes(words: Sequence[str]) -> None:
    """Warn if a configuration of a command has changed since `fit` wrote it; people edit them for another run.

    Raises:
        ConfigurationError: A configuration is not a text file.
    """
    for name, value in _options(words):
        path = Path(value)
        if name in ("-c", "--config") and path.is_file() and (changed := change_in(path)):
            warnings.warn(changed, stacklevel=2)


def configuration_of_run(words: Sequence[str], runs: str) -> Path | None:
    """Return the `config.yaml` of the run of a command's checkpoint, if the command configures no model.

    Args:
        words: The words, such as `validate --ckpt_path runs/version_0/checkpoints/last.ckpt`.
        runs: The default folder of runs, without `--trainer.default_root_dir`.

    Raises:
        ConfigurationError: There is no such file, so it must be given.
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
    """Return the words of a command with a found configuration, which may not request to run code.

    Raises:
        ConfigurationError: The configuration names classes outside this package that the command does not name.
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
