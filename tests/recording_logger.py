"""A logger of runs on a server: it has a name and an id for each run, and no folder of a run's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.loggers import Logger


class RecordingLogger(Logger):
    """Keeps what the loggers of the last run were told, by way of the class, as the command line makes its own."""

    settings: ClassVar[dict[str, Any]] = {}
    values: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self._save_dir = save_dir
        type(self).settings, type(self).values = {}, {}

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return "1a2b3c"

    @property
    def save_dir(self) -> str:
        return self._save_dir

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self.settings.update(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)
