"""The folder of a run, its `metrics.csv`, and the settings that loggers receive."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from prlhf_lightning.errors import CheckpointWriteError
from prlhf_lightning.utils.io import (
    append_whole,
    atomic_write_bytes,
    check_writable,
    naming,
    partial_path,
    put_in_place,
)

#: Loggers that create a folder for each run: `save_dir/name/version_N`.
_LOCAL = (CSVLogger, TensorBoardLogger)
#: Folders in the current directory that loggers write to by default.
_IN_CURRENT_DIRECTORY = {"WandbLogger": (".", ""), "MLFlowLogger": ("./mlruns", "mlruns")}
#: Environment variables with the rank of a process; 0 in the first process, or not set.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
#: Settings that may hold a password, or a URL with one.
_SECRET = ("url", "uri", "key", "password", "secret", "salt")


class MetricsTable(CSVLogger):
    """A CSV logger that writes only complete rows, also on a full disk, and whose errors name the file."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            with naming(Path(self.log_dir)):
                self._experiment = MetricsFile(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write remaining rows. After an error, report that error and no later one."""
        try:
            super().finalize(status)
        except CheckpointWriteError:
            if status != "failed":
                raise


class EventFiles(TensorBoardLogger):
    """A TensorBoard logger whose errors name its folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values."""
        with naming(Path(self.log_dir)):
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log settings."""
        with naming(Path(self.log_dir)):
            super().log_hyperparams(*args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        """Flush logged values to disk."""
        with naming(Path(self.log_dir)):
            path = Path(self.log_dir, self.NAME_HPARAMS_FILE)
            if path.parent.is_dir() and not path.is_file():
                _write_settings(path, dict(self.hparams))  # otherwise Lightning writes it in place
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write remaining rows. After an error, report that error and no later one."""
        try:
            with naming(Path(self.log_dir)):
                super().finalize(status)
        except CheckpointWriteError:
            if status != "failed":
                raise


_SAFE: dict[type, type] = {CSVLogger: MetricsTable, TensorBoardLogger: EventFiles}


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write `hparams.yaml` in Lightning's format, atomically."""
    partial = partial_path(path)
    with naming(path):
        try:
            save_hparams_to_yaml(partial, dict(settings))
            put_in_place(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a run, which holds its `checkpoints` folder. All processes must call it.

    It is the per-run folder of the first logger, or `trainer.default_root_dir` without loggers.
    """
    first = trainer.loggers[0] if trainer.loggers else None
    if first is None or isinstance(first, _LOCAL):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # As in ModelCheckpoint. For other loggers `trainer.log_dir` is the folder of all runs.
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    folder = Path(first.save_dir or trainer.default_root_dir, str(first.name), version)
    return trainer.strategy.broadcast(folder)


def with_run_folder(given: Logger | Iterable[Logger] | bool | None, root: str) -> tuple[list[Logger], Path | None]:
    """Return the loggers of a run and its new folder, which no other run shares.

    The first logger writes `metrics.csv` into that folder, where Lightning then stores checkpoints and configuration as
    well. The folder is that of the first given CSV logger, or else of the first TensorBoard logger,
    `save_dir/name/version_N`. Without either it is `root/version_N`.

    Args:
        given: The requested loggers. With a boolean or None only `metrics.csv` is written.
        root: Folder of all runs.

    Returns:
        The loggers, and the folder if it was created here: only in the first process, only if no logger's version was
        set, and only on a local file system.

    Raises:
        OSError: The folder cannot be made.
    """
    loggers = [] if given is None or isinstance(given, bool) else [given] if isinstance(given, Logger) else list(given)
    metrics = next((logger for logger in loggers if isinstance(logger, CSVLogger)), None)
    events = next((logger for logger in loggers if isinstance(logger, TensorBoardLogger)), None)
    if metrics is None and events is not None:
        save_dir = os.path.expanduser(os.path.expandvars(events.save_dir))  # as TensorBoardLogger does
        metrics = CSVLogger(save_dir, name=events.name, version=events._version)
    elif metrics is None:
        metrics = CSVLogger(root, name="")
    remote = "://" in metrics.root_dir
    # The given objects themselves, since callers may hold references to them.
    for logger in (metrics, *loggers):
        if type(logger) in _SAFE and "://" not in str(logger.root_dir):
            logger.__class__ = _SAFE[type(logger)]
    claimed = None
    # Loggers themselves take the first free number, so two runs that start together would take the same one.
    is_first = all(os.environ.get(name, "0") == "0" for name in _RANKS)
    if is_first and metrics._version is not None and not remote:
        check_writable(Path(metrics.log_dir))
        metrics._experiment = MetricsFile(metrics.log_dir)
    elif is_first and not remote:
        claimed = _claim(Path(metrics.root_dir))
        for logger in (metrics, *loggers):
            is_beside = isinstance(logger, _LOCAL) and Path(logger.root_dir).resolve() == claimed.parent.resolve()
            if is_beside and logger._version is None:  # type: ignore[attr-defined]
                logger._version = int(claimed.name.removeprefix("version_"))  # type: ignore[attr-defined]
        metrics._experiment = MetricsFile(metrics.log_dir)
    return [metrics, *(logger for logger in loggers if logger is not metrics)], claimed


class MetricsFile(ExperimentWriter):
    """Writes `metrics.csv` with complete rows only, also if the process is killed or the disk is full.

    A new value needs a new header. For that, Lightning's own writer truncates the file and writes it again.
    """

    _is_begun = False

    def begin_with(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start the file with rows, such as those of an earlier run."""
        columns = sorted({name for row in rows for name in row})
        header = dict(zip(columns, columns, strict=True))
        atomic_write_bytes(Path(self.metrics_file_path), _as_csv([header, *rows], columns))
        self._is_begun, self.metrics_keys = True, columns

    def save(self) -> None:
        """Append new rows to the file; the first call creates it.

        Raises:
            CheckpointWriteError: The system refused the write; the rows are kept for the next call.
        """
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        if self._is_begun and path.is_file() and {name for row in self.metrics for name in row} <= {*self.metrics_keys}:
            append_whole(path, _as_csv(self.metrics, self.metrics_keys))
        else:
            self.begin_with([*(read_metrics(path) if self._is_begun else ()), *self.metrics])
        self.metrics = []

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the settings to `hparams.yaml`."""
        self.hparams.update(params)
        _write_settings(Path(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)

    def _check_log_dir_exists(self) -> None:
        """Do not delete existing files: the run that this one resumes may still be read."""


def _as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a `metrics.csv`; none if the file does not exist."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    rows = csv.DictReader(whole.splitlines())
    return [row for row in rows if None not in row and None not in row.values()]


def _claim(root: Path) -> Path:
    """Create and return the next folder `version_N`; `mkdir` is atomic, on shared disks as well."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = [path.name.removeprefix("version_") for path in root.glob("version_*")]
    for number in itertools.count(max((int(text) for text in numbers if text.isdecimal()), default=-1) + 1):
        with suppress(FileExistsError):
            (folder := root / f"version_{number}").mkdir()
            return folder
    raise AssertionError("numbers do not end")


def keep_under(root: str, logger: Any) -> None:
    """Make a configured logger write under a folder, if it would write to the current directory by default.

    A folder that was set for a logger with per-run folders becomes absolute.

    Args:
        root: The folder.
        logger: The value of `trainer.logger` before instantiation; it is changed.
    """
    for one in logger if isinstance(logger, list) else [logger]:
        settings = getattr(one, "init_args", None)
        default, name = _IN_CURRENT_DIRECTORY.get(str(getattr(one, "class_path", "")).rpartition(".")[2], (None, ""))
        if settings and default is not None and settings.get("save_dir") == default:
            settings["save_dir"] = str(Path(root, name))
        elif settings and _makes_folders(one) and "://" not in (own := str(settings["save_dir"])):
            settings["save_dir"] = str(Path(os.path.expanduser(os.path.expandvars(own))).absolute())


def folders_of_runs(root: str, logger: Any) -> list[Path]:
    """Return the parent folders of runs with these loggers.

    Args:
        root: `trainer.default_root_dir`.
        logger: The value of `trainer.logger` before instantiation.
    """
    found = [Path(root).expanduser()]
    for one in logger if isinstance(logger, list) else [logger]:
        if _makes_folders(one):
            found.append(Path(one.init_args.save_dir, one.init_args.get("name") or "").expanduser())
    return found


def _makes_folders(configured: Any) -> bool:
    return str(getattr(configured, "class_path", "")).rpartition(".")[2] in {kind.__name__ for kind in _LOCAL}


def hyper_parameters(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return the settings of a run for its loggers by dotted names, without logger settings and possible secrets.

    Args:
        config: The configuration, nested.
    """
    found: dict[str, str | int | float | bool] = {}
    for name, value in _flat("", config):
        is_secret = any(part in name.rpartition(".")[2].lower() for part in _SECRET) or "://" in str(value)
        if not (is_secret or name.startswith(("trainer.logger", "trainer.callbacks", "config"))):
            found[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _flat(f"{name}.{number}", part)
    else:
        yield name, value
