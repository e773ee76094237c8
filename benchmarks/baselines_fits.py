"""Runs of `fit` for `baselines.py`, and the margins of validation pairs under what they trained."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from prlhf_lightning.adaptation import Shrinkage, fit_shrinkage
from prlhf_lightning.cli.adapt import to_batch
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import module_of, pick_device
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.training.user_rows import user_rows
from prlhf_lightning.types import PreferenceBatch

Floats = npt.NDArray[np.float64]
_WITHOUT_USERS = ["--model.user_model", "prlhf_lightning.user_models.UniformUserModel"]
_WITHOUT_USERS += ["--model.user_model.num_tokens", "0"]
_BATCH = 64
_TRIAL_STEPS, _TRIAL_LOG = 20, 5
_MOST_TO_SHRINK_BY = 2000


@dataclass(frozen=True)
class Fit:
    """A run of `fit` on rows of two files.

    Attributes:
        config: The configuration.
        words: Further words for `fit`.
        rows: Folder of `train.jsonl` and `validation.jsonl`.
        users: Whether the configuration's user model is kept; without, every user is the same.
        longer: Tokens by which prompts are longer than the configuration allows for.
        folder: Folder of the runs.
    """

    config: Path
    words: Sequence[str]
    rows: Path
    users: bool
    longer: int
    folder: Path

    def command(self, seed: int) -> list[str]:
        """Return the command line. An interrupted run goes on from its last checkpoint."""
        words = [sys.executable, "-m", "prlhf_lightning", "fit", "--config", str(self.config)]
        words += ["--data.source", "prlhf_lightning.data.FileSource"]
        for split in ("train", "validation"):
            words += [f"--data.source.{split}", str(self.rows / f"{split}.jsonl")]
        words += ["--data.unseen_user_fraction", "0", "--train_baseline", "false", "--seed_everything", str(seed)]
        words += ["--trainer.default_root_dir", str(self.folder), "--trainer.enable_progress_bar", "false"]
        # `fit` itself would shrink by the pairs that are measured.
        words += ["--shrink_users", "false"] if self.users else _WITHOUT_USERS
        words += self.words
        if self.longer:
            words += ["--data.max_prompt_length", str(int(self._setting("data.max_prompt_length")) + self.longer)]
        return words

    def run(self, seed: int) -> Path:
        """Train, unless that is done, and return the last checkpoint.

        Raises:
            ConfigurationError: `fit` failed; its last words are in the message, and all of them in a file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.folder / "done"
        if not done.exists():
            _call([*self.command(seed), "--ckpt_path", "last"], self.folder / "log.txt")
            done.touch()
        runs = sorted(self.folder.glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]))
        return checkpoint_of(next(run for run in reversed(runs) if (run / "checkpoints").is_dir()))

    def seconds(self, pairs: int, validation: int) -> float:
        """Return about how long a run takes, by the speed of a few steps.

        Args:
            pairs: Number of training pairs.
            validation: Number of validation pairs, which are ranked twice, at a third of a step's cost.
        """
        trial = self.folder.with_name(f"{self.folder.name}-trial")
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        words = ["--trainer.max_steps", str(_TRIAL_STEPS), "--trainer.log_every_n_steps", str(_TRIAL_LOG)]
        words += ["--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(trial)]
        _call([*self.command(0), *words], trial / "log.txt")
        with next(trial.glob("version_*/metrics.csv")).open() as file:
            speeds = [
                float(row["train/pairs_per_second"]) for row in csv.DictReader(file) if row["train/pairs_per_second"]
            ]
        shutil.rmtree(trial)
        epochs = float(self._setting("trainer.max_epochs", 1))
        return (pairs * epochs + 2 * validation / 3) / max(speeds)

    def _setting(self, name: str, default: Any = None) -> Any:
        """Return a setting of the words or the configuration."""
        for number, word in enumerate(self.words):
            if word == f"--{name}":
                return self.words[number + 1]
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        value = yaml.safe_load(self.config.read_text())
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and name.startswith("data."):
            return signature(PreferenceDataModule).parameters[name.partition(".")[2]].default
        return default if value is None else value


def margins_of(module: PersonalizedLM, pairs: Sequence[tuple[str, dict[str, Any]]], generic: bool = False) -> Floats:
    """Return the margin of each pair `[N]`; 0 for pairs that are equal once they are cut.

    Args:
        module: The model.
        pairs: Place and row of each.
        generic: Whether the generic user replaces each user.
    """
    tokenize = FeedbackTokenizer(module.policy.tokenizer, module.tokenization)
    margins = np.zeros(len(pairs))
    for start in range(0, len(pairs), _BATCH):
        some = pairs[start : start + _BATCH]
        found = to_batch(tokenize, [row for _, row in some], [place for place, _ in some])
        if found is None:
            continue
        batch, kept = found
        number = {place: start + offset for offset, (place, _) in enumerate(some)}
        chosen, rejected = module.rewards(batch.to(module.device), generic)
        margins[[number[place] for place in kept]] = (chosen - rejected).double().cpu().numpy()
    return margins


def opened(checkpoint: Path, shrinkage: Shrinkage | None = None) -> PersonalizedLM:
    """Return the model of a checkpoint, with users' rows shrunk as the command `shrink` does it."""
    content = read_checkpoint(checkpoint, "model")
    if shrinkage is not None:
        user_rows(content, checkpoint).shrink(shrinkage.best, [f"user_model.{name}" for name in shrinkage.tables])
    return module_of(content, checkpoint, "model").eval().to(pick_device("auto"))


def rows_in(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return place and row of each line of a file."""
    return [(str(where), dict(row)) for where, row in FileSource(path).rows("train")]


def shrunk_margins(checkpoint: Path, pairs: Sequence[tuple[str, dict[str, Any]]], seed: int) -> tuple[Floats, str]:
    """Return margins `[N]` with users' rows shrunk, and the factors in words.

    The factor for each half of the pairs is the one that is best on the other half, so that no pair is ranked by a
    factor that it was used to choose.
    """
    half = np.random.default_rng(seed).permutation(len(pairs)) % 2
    margins, factors = np.zeros(len(pairs)), []
    for side in (0, 1):
        module = opened(checkpoint)
        by = [pairs[place] for place in np.flatnonzero(half != side)]
        found = to_batch(FeedbackTokenizer(module.policy.tokenizer, module.tokenization), *_unzipped(by))
        if found is None:
            raise ConfigurationError("All validation pairs are equal once they are cut.")
        shrinkage = fit_shrinkage(module, _on(found[0], module), most=_MOST_TO_SHRINK_BY)
        factors.append(shrinkage.best)
        rest = np.flatnonzero(half == side)
        margins[rest] = margins_of(opened(checkpoint, shrinkage), [pairs[place] for place in rest])
    return margins, " and ".join(f"{factor:g}" for factor in factors)


def _unzipped(pairs: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[str]]:
    return [row for _, row in pairs], [place for place, _ in pairs]


def _on(batch: PreferenceBatch, module: PersonalizedLM) -> PreferenceBatch:
    return batch.to(torch.device(module.device))


def _call(command: Sequence[str], log: Path) -> None:
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ConfigurationError(f"fit failed: {''.join(last).removeprefix('error: ')} Its output is in {log}.")
