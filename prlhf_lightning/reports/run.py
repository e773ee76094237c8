"""Files of a finished run: configuration, metrics, comparison with a baseline."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # it has no stubs
from jsonargparse import ArgumentError, ArgumentParser

from prlhf_lightning.data import DataSource, PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule
from prlhf_lightning.utils.config_checksum import check_configuration
from prlhf_lightning.utils.io import unescape_cell
from prlhf_lightning.utils.trust import only_trusted_classes

_Data = TypeVar("_Data", bound=PreferenceDataModule)


@dataclass(frozen=True)
class Run:
    """The content of a run's folder.

    Attributes:
        folder: The folder; None if the checkpoint is in none.
        history: Rows of `metrics.csv`: logged values by name, with `step`.
        users: Rows of `users_seen.csv`: `user_id`, and numbers by name.
        comparison: `comparison.json` of a run with a baseline: values by contender and name.
    """

    folder: Path | None
    history: list[dict[str, float]] = field(default_factory=list)
    users: list[dict[str, str | float]] = field(default_factory=list)
    comparison: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def logged(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps at which a value was logged, and its values."""
        found = [(row["step"], row[name]) for row in self.history if name in row and "step" in row]
        return [step for step, _ in found], [value for _, value in found]


def open_run(checkpoint: Path, folder: Path | None = None) -> Run:
    """Return the content of a run's folder.

    Args:
        checkpoint: Its default folder is two levels above, as `fit` writes it.
        folder: The run's folder.

    Raises:
        ConfigurationError: The given folder does not exist, or a file in it is malformed.
    """
    if folder is None:
        beside = (checkpoint.parent.parent, checkpoint.parent)
        folder = next((one for one in beside if (one / "config.yaml").is_file()), None)
        if folder is None:
            return Run(None)
    elif not folder.is_dir():
        raise ConfigurationError(f"run: there is no folder {folder}; name the one that `fit` wrote, as runs/version_0.")
    return Run(
        folder,
        _history(folder / "metrics.csv"),
        _users(folder / "users_seen.csv"),
        _comparison(folder / "comparison.json"),
    )


def data_of(
    run: Run, source: DataSource | None, module: PersonalizedModel, trust_classes: Collection[str] | None = None
) -> PreferenceDataModule | None:
    """Return the data module of a model's training, or None if it is unknown.

    Args:
        run: The run, with its `config.yaml`.
        source: Other data, with the settings of the run, or, without a run, of the checkpoint.
        module: The model, with the tokenizer and kind of feedback.
        trust_classes: Classes outside this package that the run's configuration may name.

    Raises:
        ConfigurationError: The settings cannot be read.
    """
    path = run.folder / "config.yaml" if run.folder else None
    if path and path.is_file():
        data = _configured(path, source, PreferenceDataModule, trust_classes, ("tokenizer", "feedback"))
        data.feedback = module.loss.feedback
    elif source is not None:
        data = PreferenceDataModule(source, feedback=module.loss.feedback, **asdict(module.tokenization))
    else:
        return None
    data.tokenizer = module.policy.tokenizer
    return data


def reward_data_of(
    run: Run, source: DataSource | None, module: PersonalizedRewardModel, trust_classes: Collection[str] | None = None
) -> RewardDataModule | None:
    """Return the data module of a reward model's training, or None if it is unknown; see `data_of`."""
    path = run.folder / "config.yaml" if run.folder else None
    if path and path.is_file():
        data = _configured(path, source, RewardDataModule, trust_classes, ("tokenizer",))
    elif source is not None:
        data = RewardDataModule(source, **asdict(module.tokenization))
    else:
        return None
    data.tokenizer = module.backbone.tokenizer
    return data


def _configured(
    path: Path,
    source: DataSource | None,
    kind: type[_Data],
    trust_classes: Collection[str] | None,
    linked: Sequence[str],
) -> _Data:
    """Return a data module of the run's settings, without those that are `linked` from the model."""
    check_configuration(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data", skip={*linked})
    try:
        settings = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["data"])
        for name in linked:
            settings.pop(name, None)
        settings.pop("eval_prompts_per_user", None)  # of online RL, for its validation
        if source is not None:
            settings["source"] = {"class_path": "prlhf_lightning.data.SimulatedSource"}  # replaced below
        with only_trusted_classes(f"run: {path}", trust_classes, content=settings):
            data: _Data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
    except (OSError, ArgumentError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PRLHFError):
            raise
        raise ConfigurationError(
            f"run: {path} does not say in its 'data' which data there are: {' '.join(str(error).split())}"
        ) from error
    if source is not None:
        data.source = source
    return data


def _history(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: float(value) for name, value in row.items() if name and value} for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ConfigurationError(f"run: {path} is no table of numbers, as `fit` writes it: {error}") from error


def _users(path: Path) -> list[dict[str, str | float]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: unescape_cell(value) if name == "user_id" else float(value) for name, value in row.items()}
                for row in csv.DictReader(file)
                if row["user_id"]
            ]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ConfigurationError(f"run: {path} is no table of users, as `fit` writes it: {error}") from error


def _comparison(path: Path) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: float(value) for key, value in values.items()} for name, values in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"run: {path} is not what `fit --train_baseline true` writes: {error}") from error
